import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

/// How the parts of requests run side by side, seen from a simulated disk that counts.
@Suite struct QCOW2ConcurrencyTests {
    static let clusterSize = 65_536
    static let size = 4 << 20

    /// Every operation takes a millisecond of the disk's own clock.
    static func simulation() -> Simulation {
        var options = SimulationOptions.calm
        options.fileNanoseconds = 1_000_000...1_000_000
        options.synchronizeNanoseconds = 1_000_000...1_000_000
        options.immediatePerMille = 0
        return Simulation(seed: 1, options)
    }

    static func open(
        _ thread: IOThread, backing: JSONValue = .null
    ) async throws(BlockError) -> (BlockGraph, Edge) {
        let graph = BlockGraph(on: thread, registry: QCOW2SimulatedImage.registry)
        let node = try await graph.open(
            [
                "driver": "qcow2", "node-name": "image", "backing": backing,
                "cache-clean-interval": 0,
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], monitorOwned: true)
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: [.consistentRead, .write], shares: .all))
        return (graph, edge)
    }

    static func close(_ graph: BlockGraph, _ edge: Edge) async throws(BlockError) {
        try await graph.detach(edge)
        try await graph.closeAll()
    }

    static func filled(_ count: Int, _ value: UInt8) throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: count)
        vector.fill(value)
        return vector
    }

    /// Starts `count` tasks at once and waits for all; returns what failed.
    static func atOnce(
        _ thread: IOThread, _ count: Int,
        _ body: @escaping @Sendable (Int) async throws(BlockError) -> Void
    ) async -> [String] {
        final class State: @unchecked Sendable {
            var left: Int
            var failures: [String] = []
            var sleeper: UnsafeContinuation<Void, Never>?
            init(_ count: Int) { left = count }
        }
        let state = State(count)
        for index in 0..<count {
            thread.spawn {
                do throws(BlockError) {
                    try await body(index)
                } catch { state.failures.append("\(error)") }
                state.left -= 1
                if state.left == 0 { state.sleeper?.resume() }
            }
        }
        if state.left > 0 { await withUnsafeContinuation { state.sleeper = $0 } }
        return state.failures
    }

    @Test func theRunsOfOneRequestGoSideBySide() async throws {
        let simulation = Self.simulation()
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: Self.clusterSize, isLazy: false, size: Self.size)
        let (reading, writing) = try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await Self.open(thread)
            // Backwards: no two clusters follow each other in the file.
            let count = 16
            for index in (0..<count).reversed() {
                try await edge.write(
                    index * Self.clusterSize, from: try Self.filled(Self.clusterSize, 1))
            }
            let data = try Self.filled(count * Self.clusterSize, 2)
            var start = thread.now
            try await edge.read(0, into: data)
            let reading = thread.now - start
            start = thread.now
            try await edge.write(0, from: data)
            let writing = thread.now - start
            try await Self.close(graph, edge)
            return (reading, writing)
        }
        // One after the other, each would take 16 ms.
        #expect(reading < 4_000_000)
        #expect(writing < 4_000_000)
    }

    @Test func smallWritesToANewClusterGoBesideItsAllocation() async throws {
        let simulation = Self.simulation()
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: Self.clusterSize, isLazy: false, size: Self.size)
        let (failures, took, data) = try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await Self.open(thread)
            try await edge.write(Self.clusterSize, from: try Self.filled(4096, 99))
            let start = thread.now
            let failures = await Self.atOnce(thread, 16) { index throws(BlockError) in
                try await edge.write(index * 4096, from: try Self.filled(4096, UInt8(index + 1)))
            }
            let took = thread.now - start
            let vector = try Self.filled(Self.clusterSize, 0)
            try await edge.read(0, into: vector)
            try await Self.close(graph, edge)
            return (failures, took, vector.array)
        }
        #expect(failures == [])
        let expected = (0..<16).flatMap { [UInt8](repeating: UInt8($0 + 1), count: 4096) }
        #expect(data == expected)
        // All at once: nobody waited for another's write.
        #expect(took < 2_000_000)
    }

    @Test func smallWritesMergeIntoACopyThatIsUnderWay() async throws {
        let simulation = Self.simulation()
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: Self.clusterSize, isLazy: false, size: Self.size)
        simulation.disk.addFile("/base", bytes: [UInt8](repeating: 7, count: Self.size))
        let (failures, operations, data) = try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await Self.open(
                thread, backing: ["driver": "file", "filename": "/base", "locking": "off"])
            // So that there is an L2 table.
            try await edge.write(Self.clusterSize, from: try Self.filled(Self.clusterSize, 99))
            let before = simulation.operationCount
            let failures = await Self.atOnce(thread, 8) { index throws(BlockError) in
                try await edge.write(
                    index * 8192, from: try Self.filled(4096, UInt8(index + 100)))
            }
            let operations = simulation.operationCount - before
            let vector = try Self.filled(Self.clusterSize, 0)
            try await edge.read(0, into: vector)
            try await Self.close(graph, edge)
            return (failures, operations, vector.array)
        }
        #expect(failures == [])
        let expected = (0..<8).flatMap {
            [UInt8](repeating: UInt8($0 + 100), count: 4096) + [UInt8](repeating: 7, count: 4096)
        }
        #expect(data == expected)
        // One read of the rest, and one write of all.
        #expect(operations == 2)
    }

    /// Clusters that are there already, and read as zeroes, are filled like new ones.
    @Test func aWriteOverZeroClustersStopsAtOneThatIsBeingFilled() async throws {
        let simulation = Self.simulation()
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: Self.clusterSize, isLazy: false, size: Self.size,
            more: ["preallocation": "metadata"])
        let (failures, data) = try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await Self.open(thread)
            // So that the table is in the cache, and both requests see the same.
            try await edge.write(0, from: try Self.filled(4096, 1))
            try await edge.writeZeroes(ByteRange(4 * Self.clusterSize, 2 * Self.clusterSize))
            let failures = await Self.atOnce(thread, 2) { index throws(BlockError) in
                let cluster = Self.clusterSize
                if index == 0 {
                    try await edge.write(
                        5 * cluster + 32768, from: try Self.filled(4096, 2))
                } else {
                    try await edge.write(4 * cluster, from: try Self.filled(cluster + 4096, 3))
                }
            }
            let vector = try Self.filled(2 * Self.clusterSize, 9)
            try await edge.read(4 * Self.clusterSize, into: vector)
            try await Self.close(graph, edge)
            return (failures, vector.array)
        }
        #expect(failures == [])
        var expected = [UInt8](repeating: 0, count: 2 * Self.clusterSize)
        for index in 0..<Self.clusterSize + 4096 { expected[index] = 3 }
        for index in 0..<4096 { expected[Self.clusterSize + 32768 + index] = 2 }
        #expect(data == expected)
    }

    @Test(arguments: 1...6 as ClosedRange<UInt64>)
    func writesBesideAnAllocationThatFailsAreThereAllTheSame(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: Self.clusterSize, isLazy: false, size: Self.size)
        simulation.faults = [
            FaultRule(.write, path: "/disk", .fail(5), skip: Int(seed) % 3, times: 1)
        ]
        let wrong = try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await Self.open(thread)
            final class Done: @unchecked Sendable { var indices: Set<Int> = [] }
            let done = Done()
            _ = await Self.atOnce(thread, 16) { index throws(BlockError) in
                try await edge.write(index * 4096, from: try Self.filled(4096, UInt8(index + 1)))
                done.indices.insert(index)
            }
            let vector = try Self.filled(Self.clusterSize, 0)
            try await edge.read(0, into: vector)
            let data = vector.array
            let wrong = done.indices.sorted().filter { index in
                data[index * 4096..<(index + 1) * 4096].contains { $0 != UInt8(index + 1) }
            }
            try await Self.close(graph, edge)
            return wrong
        }
        #expect(wrong == [], "seed \(seed)")
        try QCOW2SimulatedImage.check(simulation)
    }
}
