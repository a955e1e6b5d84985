import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import Testing

@testable import BlockExports

/// A disk that takes writes and lets none go on until somebody waits for them: as a throttle whose
/// turn never comes.
private final class HoldingDriver: IdleDriver, @unchecked Sendable {
    let node: BlockNode
    private var sleepers: [UnsafeContinuation<Void, Never>] = []
    private var drainCount = 0
    var heldCount: Int { sleepers.count }

    init(_ node: BlockNode) {
        self.node = node
        node.size = 1 << 20
    }

    func read(_ offset: Int, into vector: IOVector, _ flags: ReadFlags) async throws(BlockError) {
        vector.fill(0)
    }
    func write(_ offset: Int, from vector: IOVector, _ flags: WriteFlags) async throws(BlockError) {
        if drainCount == 0 { await withUnsafeContinuation { sleepers.append($0) } }
    }

    func drainBegins() {
        drainCount += 1
        let woken = sleepers
        sleepers = []
        for continuation in woken { continuation.resume() }
    }
    func drainEnds() { drainCount -= 1 }

    static let description = DriverDescription(
        name: "holding", kind: .storage,
        open: { opening throws(BlockError) in HoldingDriver(opening.node) })
}

/// Ending exports and servers while what is below holds their clients' requests back. Where that is
/// waited for in vain, the simulation has nothing left to do and says so.
@Suite struct NBDClosingTests {
    private static func withHeldWrites(
        _ body:
            @escaping @Sendable (BlockGraph, NBDServer, NBDExport, HoldingDriver)
            async throws(BlockError) -> Void
    ) async throws {
        try await Simulation(seed: 5).run { thread throws(BlockError) in
            let graph = BlockGraph(
                on: thread, registry: DriverRegistry([HoldingDriver.description]))
            let node = try await graph.open(
                ["driver": "holding", "node-name": "disk"], monitorOwned: true)
            guard let driver = node.driver as? HoldingDriver else { return }
            let server = NBDServer(on: thread)
            let export = try NBDExport(name: "disk", node: node, writable: true)
            try server.add(export)
            server.listen(on: try Listener(on: .unix(path: "/s"), thread: thread))
            let client = try await Socket.connect(to: .unix(path: "/s"), on: thread)
            var bytes = RawClient.flags + RawClient.go("disk")
            for index in 0..<3 {
                bytes += RawClient.request(1, UInt64(index) * 512, 512, cookie: UInt64(index))
                bytes += [UInt8](repeating: 1, count: 512)
            }
            let memory = try IOVector(allocating: bytes.count)
            bytes.withUnsafeBytes { memory.copy(from: $0) }
            try await client.send(memory)
            while driver.heldCount < 3 { await thread.sleep(nanoseconds: 1_000_000) }
            try await body(graph, server, export, driver)
            client.close()
            try await server.stop()
            try await graph.closeAll()
        }
    }

    @Test func anExportEndsAlthoughItsRequestsAreHeldBack() async throws {
        try await Self.withHeldWrites { graph, server, export, _ throws(BlockError) in
            server.remove(export)
            try await export.close()
            #expect(export.connectionCount == 0)
        }
    }

    @Test func aServerEndsAlthoughRequestsAreHeldBack() async throws {
        try await Self.withHeldWrites { _, server, _, _ throws(BlockError) in
            try await server.stop()
            #expect(server.clientCount == 0)
        }
    }

    @Test func requestsAreHeldBackAgainAfterAnExportHasEnded() async throws {
        try await Self.withHeldWrites { graph, server, export, driver throws(BlockError) in
            server.remove(export)
            try await export.close()
            let user = try graph.attach(
                NamedUser("test"), to: try graph.requireNode(named: "disk"),
                Access(uses: .write, shares: .all))
            let write = server.thread.spawn {
                _ = try? await user.write(0, from: try IOVector(allocating: 512))
            }
            #expect(driver.heldCount == 1)
            try await graph.detach(user)
            await write.value
        }
    }
}
