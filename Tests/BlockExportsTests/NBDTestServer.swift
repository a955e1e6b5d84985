import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import Foundation
import QMP
import Synchronization
import Testing

@testable import BlockExports
@testable import BlockFormats

/// A server of disks in a private directory, on a Unix socket and on a TCP port of its own.
final class NBDTestServer: @unchecked Sendable {
    let thread: IOThread
    private let place: TemporaryFolder
    var folder: String { place.path }
    private(set) var port: UInt16 = 0
    let messages = Mutex<[String]>([])
    private var graph: BlockGraph?
    private var server: NBDServer?
    /// Whether there is also the export `slow`, whose requests take 0.3 s.
    private var offersSlow = false
    private var nodes: [String: BlockNode] = [:]

    var socketPath: String { "\(folder)/s" }
    /// The URI of an export on the Unix socket.
    func uri(_ name: String = "disk") -> String {
        "nbd+unix:///\(name)?socket=\(socketPath)"
    }

    /// Runs `body` with a server that has the writable export `disk` (8 MiB; data in the first and the
    /// last 64 KiB and at 1 MiB) and the read-only export `fixed` on a file of its own.
    @discardableResult
    static func with<T>(
        options: NBDServer.Options = NBDServer.Options(), slow: Bool = false,
        _ body: (NBDTestServer) async throws -> T
    ) async throws -> T {
        let setup = try NBDTestServer()
        setup.offersSlow = slow
        defer {
            setup.thread.stop()
            setup.place.remove()
        }
        try await setup.start(options)
        let result: T
        do {
            result = try await body(setup)
        } catch {
            try await setup.stop()
            throw error
        }
        try await setup.stop()
        return result
    }

    private init() throws {
        place = try TemporaryFolder()
        thread = try IOThread(name: "nbd-test")
    }

    static let size = 8 << 20

    private func start(_ options: NBDServer.Options) async throws {
        for name in ["disk", "fixed"] {
            var data = Data(count: Self.size)
            for range in [
                0..<65_536, (1 << 20)..<(1 << 20) + 65_536, Self.size - 65_536..<Self.size,
            ] {
                for index in range { data[index] = UInt8(truncatingIfNeeded: index / 512 + 1) | 1 }
            }
            // Zeroes in the source become holes in the file, so that block status has them.
            try data.write(to: URL(fileURLWithPath: "\(folder)/\(name).full"))
            _ = try run(["cp", "--sparse=always", "\(folder)/\(name).full", "\(folder)/\(name)"])
        }
        try await thread.run { [self] () throws(BlockError) in
            let graph = BlockGraph(
                on: thread, registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
            self.graph = graph
            let server = NBDServer(on: thread, options) { [self] message in
                messages.withLock { $0.append(message) }
            }
            self.server = server
            for name in ["disk", "fixed"] {
                let node = try await graph.open(
                    [
                        "driver": "raw", "node-name": .string(name), "discard": "unmap",
                        "read-only": .bool(name == "fixed"),
                        "file": ["driver": "file", "filename": .string("\(folder)/\(name)")],
                    ], monitorOwned: true)
                nodes[name] = node
                try server.add(
                    NBDExport(
                        name: name, description: "the \(name)", node: node,
                        writable: name == "disk", allocationDepth: true))
            }
            let slow = try await graph.open(
                [
                    "driver": "null-co", "node-name": "slow", "size": 65_536,
                    "latency-ns": 300_000_000,
                ], monitorOwned: true)
            if offersSlow { try server.add(NBDExport(name: "slow", node: slow, writable: true)) }
            server.listen(on: try Listener(on: .unix(path: socketPath), thread: thread))
            let tcp = try Listener(on: .ipv4(address: 0x7f00_0001, port: 0), thread: thread)
            server.listen(on: tcp)
            if case .ipv4(_, let port) = tcp.address { self.port = port }
        }
    }

    private var isStopped = false

    func stop() async throws {
        guard !isStopped else { return }
        isStopped = true
        try await thread.run { [self] () throws(BlockError) in
            try await server?.stop()
            try await graph?.closeAll()
        }
    }

    var clientCount: Int {
        get async throws {
            try await thread.run { [self] () throws(BlockError) in server?.clientCount ?? 0 }
        }
    }

    /// What each client holds, in bytes.
    var bytesInFlight: [Int] {
        get async throws {
            try await thread.run { [self] () throws(BlockError) in
                server?.connections.map(\.bytesInFlight) ?? []
            }
        }
    }

    /// Reads of an export that were carried out.
    func readCount(_ name: String = "disk") async throws -> Int {
        try await thread.run { [self] () throws(BlockError) -> Int in
            guard let edge = server?.exportNamed(name)?.edge else { return 0 }
            return Int(edge.statistics[RequestKind.read].requests)
        }
    }

    func removeExport(_ name: String) async throws {
        try await thread.run { [self] () throws(BlockError) in
            guard let export = server?.exportNamed(name) else { return }
            server?.remove(export)
            try await export.close()
        }
    }

    // MARK: Programs

    struct Output {
        var status: Int32
        var text: String
    }

    /// Runs a program; output and errors together. What hangs is ended after five minutes.
    func run(_ arguments: [String]) throws -> Output {
        let result = try ChildProgram.run(
            arguments, in: folder,
            environment: ["PATH": "/usr/bin:/bin", "HOME": folder, "LC_ALL": "C.UTF-8"],
            errors: .joined)
        return Output(status: result.status, text: result.output)
    }

    /// Runs a program that must succeed.
    @discardableResult
    func check(_ arguments: [String]) throws -> String {
        let output = try run(arguments)
        #expect(output.status == 0, "\(arguments.joined(separator: " ")): \(output.text)")
        return output.text
    }

    /// Runs Python with libnbd's module; `h` is a handle, `uri` the export's URI.
    @discardableResult
    func python(_ text: String, uri: String? = nil) throws -> String {
        let prelude = "import nbd, os\nh = nbd.NBD()\nuri = '\(uri ?? self.uri())'\n"
        return try check(["/usr/bin/python3", "-c", prelude + text])
    }

    func contents(_ name: String = "disk") throws -> Data {
        try Data(contentsOf: URL(fileURLWithPath: "\(folder)/\(name)"))
    }
}
