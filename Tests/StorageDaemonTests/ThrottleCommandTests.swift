import BlockCore
import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Throttle groups over QMP and on the command line, beside `qemu-storage-daemon`.
@Suite struct ThrottleCommandTests {
    private static let group = [
        "--object", "throttle-group,id=g,limits.iops-total=100,x-bps-write=1000000",
    ]

    @Test func limitsAreReadAndChangedWhileInUse() async throws {
        let nodes = [
            "--blockdev", "driver=throttle,node-name=t,throttle-group=g,file.driver=null-co",
        ]
        try await MonitoredDaemon.with(Self.group + nodes) { daemon in
            let client = try daemon.client()
            let path: JSONValue = "/objects/g"
            var limits = try client.execute("qom-get", ["path": path, "property": "limits"])
            #expect(limits["iops-total"] == 100 && limits["bps-write"] == 1_000_000)
            #expect(limits["bps-read-max-length"] == 1)
            try client.execute(
                "qom-set",
                ["path": "g", "property": "limits", "value": ["iops-total": 0, "iops-read": 7]])
            limits = try client.execute("qom-get", ["path": path, "property": "limits"])
            #expect(limits["iops-total"] == 0 && limits["iops-read"] == 7)
            #expect(limits["bps-write"] == 1_000_000)
            #expect(throws: (any Error).self) {
                try client.execute(
                    "qom-set", ["path": path, "property": "limits", "value": ["bps-total": 1]])
            }
            #expect(throws: (any Error).self) { try client.execute("object-del", ["id": "g"]) }
            try client.execute("blockdev-del", ["node-name": "t"])
            try client.execute("object-del", ["id": "g"])
            #expect(throws: (any Error).self) {
                try client.execute("qom-get", ["path": path, "property": "limits"])
            }
        }
    }

    /// Which limits contradict each other is the same as for QEMU's daemon.
    @Test(arguments: [
        "x-bps-total=1,x-bps-read=1", "x-bps-total=1,x-iops-read=1", "x-iops-total-max=1",
        "x-iops-total=5,x-iops-total-max=4", "x-iops-total=5,x-iops-total-max=5",
        "x-iops-total=5,x-iops-total-max-length=2", "x-iops-total=5,x-iops-total-max-length=1",
        "x-iops-size=4096", "x-iops-size=4096,x-iops-read=1", "x-bps-read-max-length=0",
        "x-bps-read=1,x-bps-read-max=1000000000000000,x-bps-read-max-length=2",
        "x-bps-read=1000000000000000", "x-bps-read=1000000000000001", "x-bps-read=-1",
        "limits.bps-read=1,limits.bps-total=1", "limits.bps-read=1,limits.iops-total=1",
        "limits.iops-size=1", "x-foo=1", "limits.foo=1", "",
    ])
    func limitsAreTakenAsByQEMU(options: String) async throws {
        let text = "throttle-group,id=g" + (options.isEmpty ? "" : "," + options)
        // The second option ends it, whatever becomes of the first.
        let message = try ChildProgram.run([
            "qemu-storage-daemon", "--object", text, "--blockdev", "driver=null-co",
        ]).errors
        let isAccepted = message.contains("node-name")
        do {
            try await MonitoredDaemon.with(["--object", text]) { _ in }
            #expect(isAccepted, "QEMU says: \(message)")
        } catch let error as BlockError {
            #expect(!isAccepted, "\(error)")
        }
    }
}
