import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP

/// A graph on a simulated machine, whose clock runs only when everybody waits.
final class SimulatedGraph: @unchecked Sendable {
    let graph: BlockGraph
    var thread: IOThread { graph.thread }
    private var users: [Edge] = []

    private static let registry = DriverRegistry(
        BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)

    private init(_ thread: IOThread) {
        graph = BlockGraph(on: thread, registry: Self.registry)
    }

    /// Runs `body`, and closes everything afterwards.
    static func with<T: Sendable>(
        _ simulation: Simulation = Simulation(seed: 1),
        _ body: @escaping @Sendable (SimulatedGraph) async throws(BlockError) -> T
    ) async throws -> T {
        try await simulation.run { thread throws(BlockError) in
            let setup = SimulatedGraph(thread)
            do throws(BlockError) {
                let result = try await body(setup)
                try await setup.close()
                return result
            } catch {
                try? await setup.close()
                throw error
            }
        }
    }

    private func close() async throws(BlockError) {
        for edge in users { try await graph.detach(edge) }
        try await graph.closeAll()
    }

    @discardableResult
    func open(_ options: JSONValue) async throws(BlockError) -> BlockNode {
        try await graph.open(options, monitorOwned: true)
    }

    /// A user of a node that reads and writes.
    func use(
        _ name: String, _ uses: Permission = [.consistentRead, .write]
    ) throws(BlockError) -> Edge {
        let edge = try graph.attach(
            NamedUser("test"), to: try graph.requireNode(named: name),
            Access(uses: uses, shares: .all))
        users.append(edge)
        return edge
    }

    func leave(_ edge: Edge) async throws(BlockError) {
        users.removeAll { $0 === edge }
        try await graph.detach(edge)
    }

    /// Makes a qcow2 image in the simulated file `path`.
    func createQCOW2(_ path: String, size: Int, clusterSize: Int = 65536) async throws(BlockError) {
        let options: JSONValue = [
            "size": .integer(size), "cluster-size": .integer(clusterSize),
            "file": ["driver": "file", "filename": .string(path)],
        ]
        let creation = ImageCreation(graph, options: try OptionReader(options, of: "creation"))
        guard let create = try Self.registry.driver(named: "qcow2").create else { return }
        try await create(creation)
        try await creation.finish()
    }

    func write(_ edge: Edge, _ offset: Int, _ count: Int, _ value: UInt8) async throws(BlockError) {
        try await edge.fill(ByteRange(offset, count), with: value)
    }

    /// The values among the bytes.
    func read(_ edge: Edge, _ offset: Int, _ count: Int) async throws(BlockError) -> Set<UInt8> {
        Set(try await edge.contents(of: ByteRange(offset, count)))
    }

    typealias Work = @Sendable () async throws(BlockError) -> Void

    /// Many small writes.
    func writes(_ edge: Edge, count: Int) -> [Work] {
        // Not given to the array at once: the compiler cannot lower that.
        let write: Work = { () throws(BlockError) in try await self.write(edge, 0, 512, 1) }
        return Array(repeating: write, count: count)
    }

    /// Runs all of `bodies` at once and waits for them.
    func together(_ bodies: [Work]) async -> [BlockError] {
        final class Tally: @unchecked Sendable {
            var left: Int
            var errors: [BlockError] = []
            var sleeper: UnsafeContinuation<Void, Never>?
            init(_ left: Int) { self.left = left }
        }
        let tally = Tally(bodies.count)
        for body in bodies {
            thread.spawn {
                do throws(BlockError) { try await body() } catch { tally.errors.append(error) }
                tally.left -= 1
                if tally.left == 0 { tally.sleeper?.resume() }
            }
        }
        if tally.left > 0 { await withUnsafeContinuation { tally.sleeper = $0 } }
        return tally.errors
    }
}
