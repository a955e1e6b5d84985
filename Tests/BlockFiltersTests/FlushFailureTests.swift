import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

#if canImport(Glibc)
import Glibc
#endif

/// What a failed flush leaves behind: a loss that is told for ever, or a want of space that passes.
@Suite struct FlushFailureTests {
    private static let size = 4 << 20

    /// Runs `body` with a disk of `format` whose `event` fails once with `errno`.
    private static func with<T: Sendable>(
        _ format: String, event: String, errno: Int,
        _ body: @escaping @Sendable (SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        let simulation = Simulation(seed: 1, .calm)
        simulation.disk.addFile("/a", size: format == "raw" ? size : 0)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            if format == "qcow2" { try await setup.createQCOW2("/a", size: size) }
            try await setup.open([
                "driver": .string(format), "node-name": "disk",
                "file": [
                    "driver": "blkdebug", "image": ["driver": "file", "filename": "/a"],
                    "inject-error": [
                        ["event": .string(event), "once": true, "errno": .integer(errno)]
                    ],
                ],
            ])
            return try await body(setup, try setup.use("disk"))
        }
    }

    /// Runs `body` with a disk in a file of which something was written and nothing flushed.
    private static func withWrittenFile<T: Sendable>(
        _ body:
            @escaping @Sendable (Simulation, SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        let simulation = Simulation(seed: 1, .calm)
        simulation.disk.addFile("/a", size: size)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            try await setup.open([
                "driver": "raw", "node-name": "disk",
                "file": ["driver": "file", "filename": "/a"],
            ])
            let edge = try setup.use("disk")
            try await setup.write(edge, 0, 65536, 1)
            return try await body(simulation, setup, edge)
        }
    }

    /// Closes the disk, which may fail as flushes did.
    private static func close(
        _ setup: SimulatedGraph, _ edge: Edge
    ) async throws(BlockError) -> BlockError.Code? {
        try await setup.leave(edge)
        let node = try setup.graph.requireNode(named: "disk")
        return await code { () throws(BlockError) in try await setup.graph.remove(node) }
    }

    private static func code(
        _ body: () async throws(BlockError) -> Void
    ) async -> BlockError.Code? {
        do throws(BlockError) {
            try await body()
            return nil
        } catch { return error.code }
    }

    private static func durableWrite(_ edge: Edge) async throws(BlockError) {
        try await edge.fill(ByteRange(65536, 4096), with: 7, .fua)
    }

    @Test(arguments: ["raw", "qcow2"]) func aLossIsToldByFlushesDurableWritesAndTheEnd(
        format: String
    ) async throws {
        let codes = try await Self.with(format, event: "flush_to_disk", errno: 5) {
            setup, edge throws(BlockError) in
            try await setup.write(edge, 0, 65536, 1)
            let codes = [
                await Self.code { () throws(BlockError) in try await edge.flush() },
                await Self.code { () throws(BlockError) in try await edge.flush() },
                await Self.code { () throws(BlockError) in try await Self.durableWrite(edge) },
                await Self.code { () throws(BlockError) in
                    try await edge.writeZeroes(ByteRange(0, 65536), .fua)
                },
            ]
            // One that promises nothing.
            try await setup.write(edge, 0, 4096, 2)
            return codes + [try await Self.close(setup, edge)]
        }
        #expect(codes == Array(repeating: .inputOutput, count: 5))
    }

    /// Whatever number the system tells of writes that did not get to storage, it does so once.
    @Test(arguments: [EIO, ENOSPC, ESTALE, ENODEV, ETIMEDOUT], [false, true])
    func aDurableChangeThatIsToldOfALossMakesFlushesAndTheEndFail(
        error: Int32, isZeroing: Bool
    ) async throws {
        let codes = try await Self.withWrittenFile { simulation, setup, edge throws(BlockError) in
            simulation.faults = [
                FaultRule(isZeroing ? .synchronize : .write, path: "/a", .fail(error), times: 1)
            ]
            let codes = [
                await Self.code { () throws(BlockError) in
                    if isZeroing {
                        try await edge.writeZeroes(ByteRange(65536, 65536), .fua)
                    } else {
                        try await Self.durableWrite(edge)
                    }
                },
                await Self.code { () throws(BlockError) in try await edge.flush() },
                await Self.code { () throws(BlockError) in try await edge.flush() },
            ]
            return codes + [try await Self.close(setup, edge)]
        }
        let expected = BlockError.Code(systemError: error)
        #expect(codes == Array(repeating: expected, count: 4))
    }

    /// The system tells one of those that ask at the same time: the other one must not promise anything.
    @Test(arguments: [false, true]) func aLossToldToOneIsToldToAFlushBesideIt(
        isWrite: Bool
    ) async throws {
        let codes = try await Self.withWrittenFile { simulation, setup, edge throws(BlockError) in
            simulation.faults = [
                FaultRule(isWrite ? .write : .synchronize, path: "/a", .fail(EIO), times: 1)
            ]
            let flush: SimulatedGraph.Work = { () throws(BlockError) in try await edge.flush() }
            let write: SimulatedGraph.Work = { () throws(BlockError) in
                try await Self.durableWrite(edge)
            }
            let codes = await setup.together([isWrite ? write : flush, flush]).map(\.code)
            _ = try await Self.close(setup, edge)
            return codes
        }
        #expect(codes == [.inputOutput, .inputOutput])
    }

    @Test func aDurableWriteThatFindsNoSpaceForItselfLeavesFlushesAlone() async throws {
        let codes = try await Self.withWrittenFile { simulation, setup, edge throws(BlockError) in
            simulation.faults = [FaultRule(.write, path: "/a", .fail(ENOSPC))]
            let first = await Self.code { () throws(BlockError) in
                try await Self.durableWrite(edge)
            }
            simulation.faults = []
            let flush = await Self.code { () throws(BlockError) in try await edge.flush() }
            try await Self.durableWrite(edge)
            return [first, flush]
        }
        #expect(codes == [.noSpace, nil])
    }

    @Test(arguments: [28, 5]) func tablesThatCouldNotBeWrittenAreWrittenLater(
        errno: Int
    ) async throws {
        let codes = try await Self.with("qcow2", event: "l2_update", errno: errno) {
            setup, edge throws(BlockError) in
            try await setup.write(edge, 0, 65536, 1)
            let first = await Self.code { () throws(BlockError) in try await edge.flush() }
            let second = await Self.code { () throws(BlockError) in try await edge.flush() }
            try await Self.durableWrite(edge)
            return [first, second]
        }
        #expect(codes == [errno == 28 ? .noSpace : .inputOutput, nil])
    }

    /// The tables of the temporary image stay in memory, and are as good there.
    @Test(arguments: [("break-guest-write", true), ("break-snapshot", false)])
    func aTargetWithoutSpaceForItsTablesBreaksTheSnapshotByItsPolicy(
        policy: String, keeps: Bool
    ) async throws {
        let simulation = Simulation(seed: 1, .calm)
        simulation.disk.addFile("/disk", bytes: [UInt8](repeating: 0xaa, count: Self.size))
        simulation.disk.addFile("/temp", size: 0)
        let (flush, read) = try await SimulatedGraph.with(simulation) {
            setup throws(BlockError) in
            try await setup.createQCOW2("/temp", size: Self.size)
            try await setup.open([
                "driver": "copy-before-write", "node-name": "filter",
                "on-cbw-error": .string(policy),
                "file": ["driver": "file", "filename": "/disk"],
                "target": [
                    "driver": "qcow2",
                    "file": [
                        "driver": "blkdebug", "image": ["driver": "file", "filename": "/temp"],
                        "inject-error": [["event": "l2_update", "errno": 28, "iotype": "write"]],
                    ],
                ],
            ])
            try await setup.open(
                ["driver": "snapshot-access", "node-name": "frozen", "file": "filter"])
            let guest = try setup.use("filter")
            let snapshot = try setup.use("frozen", .consistentRead)
            try await setup.write(guest, 0, 65536, 1)
            let flush = await Self.code { () throws(BlockError) in try await guest.flush() }
            let read = try? await setup.read(snapshot, 0, 131_072)
            // The image closes without its tables.
            for edge in [guest, snapshot] { try await setup.leave(edge) }
            for name in ["frozen", "filter"] {
                try? await setup.graph.remove(try setup.graph.requireNode(named: name))
            }
            return (flush, read)
        }
        #expect(flush == nil)
        let expected: Set<UInt8>? = keeps ? [0xaa] : nil
        #expect(read == expected)
    }
}
