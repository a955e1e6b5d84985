import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Virtual sockets, where the kernel has them: a guest's way to its host.
@Suite(
    .enabled(
        if: FileManager.default.fileExists(atPath: "/dev/vsock"),
        "the kernel has no virtual sockets"
    ))
struct VirtualSocketTests {
    /// Whether a process reaches another one of the same machine: with the module vsock_loopback.
    private static let hasLoopback = FileManager.default.fileExists(
        atPath: "/sys/module/vsock_loopback")

    @Test func theServerListensOnAVirtualSocket() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try daemon.client()
            try client.execute("nbd-server-stop")
            // 4294967295 is VMADDR_CID_ANY, of this machine whatever its number.
            let port = 20_000 + Int(UInt16.random(in: 0 ... .max))
            func address(_ cid: String) -> JSONValue {
                [
                    "addr": [
                        "type": "vsock", "data": ["cid": .string(cid), "port": .string("\(port)")],
                    ]
                ]
            }
            let refused = try client.refusal("nbd-server-start", address("many"))
            #expect(refused.contains("cid"))
            try client.execute("nbd-server-start", address("4294967295"))
            let found = try client.execute("x-query-nbd-server")
            #expect(
                found["addresses"] == [
                    ["type": "vsock", "cid": "4294967295", "port": .string("\(port)")]
                ])
            guard Self.hasLoopback else { return }
            try client.execute(
                "block-export-add", ["type": "nbd", "id": "v", "node-name": "r"])
            let result = try ChildProgram.run(["nbdinfo", "--size", "nbd+vsock://1:\(port)/r"])
            #expect(result.status == 0, "\(result.errors)")
        }
    }
}
