import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// `copy-on-read` above `overlay` (qcow2), above `middle` (qcow2), above `base` (raw).
@Suite struct CopyOnReadTests {
    private static let size = 1 << 20

    private static func withChain<T: Sendable>(
        _ options: JSONValue = [:],
        _ body: @escaping @Sendable (SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        let simulation = Simulation(seed: 3)
        simulation.disk.addFile("/base", size: size)
        simulation.disk.addFile("/middle", size: 0)
        simulation.disk.addFile("/overlay", size: 0)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            try await setup.open(["driver": "file", "node-name": "base", "filename": "/base"])
            let base = try setup.use("base")
            try await setup.write(base, 0, size / 2, 0xaa)
            try await setup.leave(base)
            for (name, backing) in [("middle", "base"), ("overlay", "middle")] {
                try await setup.createQCOW2("/\(name)", size: size)
                try await setup.open(
                    [
                        "driver": "qcow2", "node-name": .string(name), "backing": .string(backing),
                        "file": ["driver": "file", "filename": .string("/\(name)")],
                    ])
            }
            let middle = try setup.use("middle")
            try await setup.write(middle, 0, 65536, 0xbb)
            try await setup.leave(middle)
            var object: JSONObject = [
                "driver": "copy-on-read", "node-name": "cor", "file": "overlay",
                "discard": "unmap",
            ]
            if case .object(let more) = options {
                for (key, value) in more.members { object[key] = value }
            }
            try await setup.open(.object(object))
            return try await body(setup, try setup.use("cor"))
        }
    }

    /// Which clusters the overlay itself has.
    private static func allocated(_ setup: SimulatedGraph) async throws(BlockError) -> [Int] {
        let edge = try setup.use("overlay", .consistentRead)
        var clusters: [Int] = []
        for cluster in 0..<(size / 65536) {
            let status = try await edge.blockStatus(ByteRange(cluster * 65536, 65536))
            if status.flags.contains(.allocated) { clusters.append(cluster) }
        }
        try await setup.leave(edge)
        return clusters
    }

    @Test func whatIsReadIsInTheOverlayAfterwards() async throws {
        let result = try await Self.withChain { setup, edge throws(BlockError) in
            #expect(try await setup.read(edge, 1000, 10) == [0xbb])
            #expect(try await setup.read(edge, 5 * 65536 + 1, 65536) == [0xaa])
            #expect(try await setup.read(edge, 9 * 65536, 10) == [0])
            let overlay = try setup.use("overlay", .consistentRead)
            #expect(try await setup.read(overlay, 0, 65536) == [0xbb])
            #expect(try await setup.read(overlay, 5 * 65536, 131072) == [0xaa])
            try await setup.leave(overlay)
            return try await Self.allocated(setup)
        }
        #expect(result == [0, 5, 6, 9])
    }

    @Test func belowTheBottomNothingIsCopied() async throws {
        let result = try await Self.withChain(["bottom": "middle"]) {
            setup, edge throws(BlockError) in
            #expect(try await setup.read(edge, 0, 131072) == [0xbb, 0xaa])
            #expect(try await setup.read(edge, 9 * 65536, 65536) == [0])
            return try await Self.allocated(setup)
        }
        #expect(result == [0])
    }

    @Test func aPrefetchCopies() async throws {
        let result = try await Self.withChain { setup, edge throws(BlockError) in
            let memory = try IOVector(allocating: 65536)
            try await edge.read(2 * 65536, into: memory, .prefetch)
            return try await Self.allocated(setup)
        }
        #expect(result == [2])
    }

    @Test(arguments: 1...6) func writesBesideReadsAreNotLost(seed: Int) async throws {
        let violations = try await Self.withChain { setup, edge throws(BlockError) in
            let data = try IOVector(allocating: Self.size)
            let overlay = try setup.use("overlay", .consistentRead)
            try await overlay.read(0, into: data)
            try await setup.leave(overlay)
            var options = RandomRequests.Options()
            options.count = 400
            let run = RandomRequests(
                edge, ShadowDisk(bytes: data.array), seed: UInt64(seed), options)
            await run.run()
            await run.verify()
            return run.violations
        }
        #expect(violations == [], "seed \(seed)")
    }

    @Test func nobodyElseWritesPastIt() async throws {
        let code = try await Self.withChain { setup, _ throws(BlockError) in
            do throws(BlockError) {
                _ = try setup.use("overlay")
                return BlockError.Code.busy
            } catch {
                return error.code
            }
        }
        #expect(code == .permissionDenied)
    }

    @Test(arguments: ["none", "cor", "file"]) func aBottomMustBeInTheChain(name: String)
        async throws
    {
        await #expect(throws: BlockError.self) {
            try await Self.withChain(["bottom": .string(name)]) { setup, _ throws(BlockError) in }
        }
    }

    @Test func aChildThatCannotBeWrittenIsRefused() async throws {
        await #expect(throws: BlockError.self) {
            try await SimulatedGraph.with { setup throws(BlockError) in
                try await setup.open(
                    [
                        "driver": "copy-on-read", "node-name": "cor",
                        "file": ["driver": "null-co", "read-only": true],
                    ])
            }
        }
    }
}
