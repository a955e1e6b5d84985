import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// Snapshots on a disk that loses power at each of its writes and flushes in turn.
@Suite struct QCOW2SnapshotPowerTests {
    static let size = 300_032

    enum Change: String, CaseIterable, Sendable { case create, delete, apply }

    struct Case: Sendable, CustomTestStringConvertible {
        var change: Change
        var clusterSize: Int
        var version = "v3"
        var isLazy = false
        var testDescription: String {
            "\(change.rawValue), \(clusterSize), \(version)\(isLazy ? ", lazy" : "")"
        }
    }

    static let cases: [Case] = Change.allCases.flatMap { change in
        [
            Case(change: change, clusterSize: 512),
            Case(change: change, clusterSize: 16384),
            Case(change: change, clusterSize: 4096, version: "v2"),
            Case(change: change, clusterSize: 4096, isLazy: true),
        ]
    }

    /// What is known of the image from boot to boot.
    final class State: @unchecked Sendable {
        var disk = [UInt8](repeating: 0, count: size)
        var snapshots: [String: [UInt8]] = [:]
        /// The change was reported done.
        var isDone = false

        func fill(_ range: Range<Int>, _ value: UInt8) {
            disk.replaceSubrange(range, with: repeatElement(value, count: range.count))
        }
    }

    static func open(
        _ thread: IOThread, writable: Bool = true
    ) async throws(BlockError) -> (BlockGraph, Edge) {
        let graph = BlockGraph(on: thread, registry: QCOW2SimulatedImage.registry)
        let node = try await graph.open(
            [
                "driver": "qcow2", "node-name": "image", "discard": "unmap",
                "read-only": .bool(!writable), "l2-cache-size": 1024, "l2-cache-entry-size": 512,
                "cache-clean-interval": 0,
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], monitorOwned: true)
        let uses: Permission = writable ? [.consistentRead, .write] : .consistentRead
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: uses, shares: .all))
        return (graph, edge)
    }

    static func close(_ graph: BlockGraph, _ edge: Edge) async {
        try? await graph.detach(edge)
        try? await graph.closeAll()
    }

    /// A disk with two snapshots, which share a part.
    static func prepare(_ simulation: Simulation, _ test: Case) async throws -> State {
        let state = State()
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: test.clusterSize, isLazy: test.isLazy, size: size,
            version: test.version)
        try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await open(thread)
            for (name, range, value) in [
                ("a", 0..<100_000, 1), ("b", 50_000..<150_000, 2), ("", 30_000..<60_000, 3),
            ] as [(String, Range<Int>, UInt8)] {
                try await QCOW2SnapshotTests.fill(edge, range, value)
                state.fill(range, value)
                if name.isEmpty { continue }
                try await QCOW2SnapshotTests.create(edge, name)
                state.snapshots[name] = state.disk
            }
            try await edge.flush()
            await close(graph, edge)
        }
        return state
    }

    static func carryOut(_ change: Change, _ edge: Edge) async throws(BlockError) {
        switch change {
        case .create: try await QCOW2SnapshotTests.create(edge, "c")
        case .delete: try await QCOW2SnapshotTests.delete(edge, "a")
        case .apply: try await QCOW2SnapshotTests.apply(edge, "a")
        }
    }

    /// - Parameter writable: whether it is also written, to see that this hurts no snapshot.
    /// - Returns: what is wrong with what is left.
    static func verify(
        _ simulation: Simulation, _ test: Case, _ state: State, writable: Bool = true
    ) async throws -> [String] {
        try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await open(thread, writable: writable)
            var wrong: [String] = []
            let store = try edge.node.requireSnapshotStore()
            let names = Set(store.internalSnapshots.map(\.name))
            for name in names {
                let expected = state.snapshots[name] ?? state.disk
                if try await QCOW2SnapshotTests.contents(edge, ofSnapshot: name) != expected {
                    wrong.append("snapshot \(name) is damaged")
                }
            }
            let disk = try await QCOW2SnapshotTests.everything(edge)
            let before = Set(state.snapshots.keys)
            switch test.change {
            case .create:
                if names != before.union(["c"]), state.isDone || names != before {
                    wrong.append("the snapshots are \(names)")
                }
                if disk != state.disk { wrong.append("the disk changed") }
            case .delete:
                if names != ["b"], state.isDone || names != before {
                    wrong.append("the snapshots are \(names)")
                }
                if disk != state.disk { wrong.append("the disk changed") }
            case .apply:
                if names != before { wrong.append("the snapshots are \(names)") }
                if disk != state.snapshots["a"], state.isDone || disk != state.disk {
                    wrong.append("the disk is neither as before nor as in the snapshot")
                }
            }
            // Writes afterwards hurt no snapshot.
            if writable { try await QCOW2SnapshotTests.fill(edge, 0..<size, 9) }
            for name in names {
                let expected = state.snapshots[name] ?? state.disk
                if try await QCOW2SnapshotTests.contents(edge, ofSnapshot: name) != expected {
                    wrong.append("snapshot \(name) is damaged by a later write")
                }
            }
            await close(graph, edge)
            return wrong
        }
    }

    @Test(arguments: cases) func aPowerCutLeavesTheImageAsBeforeOrAsAfter(test: Case) async throws {
        for operation in [SimulatedOperation.write, .synchronize] {
            var cut = 0
            while cut < 400 {
                let simulation = Simulation(seed: UInt64(cut + 1))
                let state = try await Self.prepare(simulation, test)
                simulation.faults = [
                    FaultRule(operation, path: "/disk", .crash, skip: cut, times: 1)
                ]
                let outcome = try await simulation.boot { thread throws(BlockError) in
                    let (graph, edge) = try await Self.open(thread)
                    try await Self.carryOut(test.change, edge)
                    state.isDone = true
                    await Self.close(graph, edge)
                }
                simulation.faults = []
                let wrong = try await Self.verify(simulation, test, state)
                #expect(wrong == [], "\(test), cut at \(operation) \(cut)")
                // Version 2 cannot tell that flags are out of date.
                if test.version == "v3" { try QCOW2SimulatedImage.check(simulation) }
                if case .finished = outcome { break }
                // All of the first, then here and there.
                cut += cut < 30 ? 1 : 7
            }
            #expect(cut > 1 && cut < 400)
        }
    }

    /// Whether the header's incompatible features say so.
    static func isMarkedCorrupt(_ simulation: Simulation) throws -> Bool {
        let bytes = try #require(simulation.disk.bytes(of: "/disk"))
        return bytes[79] & 2 != 0
    }

    @Test(arguments: Change.allCases)
    func aFailingDiskLeavesTheImageAsBeforeOrAsAfter(change: Change) async throws {
        let runs = 25
        for operation in [SimulatedOperation.write, .synchronize] {
            var failureCount = 0
            var writtenCount = 0
            for skip in 0..<runs {
                let test = Case(change: change, clusterSize: 4096)
                let simulation = Simulation(seed: UInt64(skip + 1))
                let state = try await Self.prepare(simulation, test)
                simulation.faults = [
                    FaultRule(operation, path: "/disk", .fail(5), skip: skip, times: 1)
                ]
                try await simulation.run { thread throws(BlockError) in
                    let (graph, edge) = try await Self.open(thread)
                    do throws(BlockError) {
                        try await Self.carryOut(change, edge)
                        state.isDone = true
                    } catch {
                        // It tells; what is left is looked at below.
                    }
                    await Self.close(graph, edge)
                }
                simulation.faults = []
                if !state.isDone { failureCount += 1 }
                // What was found to be uncertain is marked corrupt, and not to be written.
                let isCorrupt = try Self.isMarkedCorrupt(simulation)
                let wrong = try await Self.verify(simulation, test, state, writable: !isCorrupt)
                #expect(wrong == [], "\(change), failing \(operation) \(skip)")
                if isCorrupt { continue }
                writtenCount += 1
                try QCOW2SimulatedImage.check(simulation)
            }
            #expect(failureCount > 0, "\(change), failing \(operation)")
            #expect(writtenCount > runs / 2, "\(change), failing \(operation)")
        }
    }
}
