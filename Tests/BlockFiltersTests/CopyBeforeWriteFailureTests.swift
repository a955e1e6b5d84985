import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import Glibc
import QMP
import Testing

@testable import BlockFilters

/// What becomes of guests and snapshots when the target of copy-before-write fails, stalls or is slow.
@Suite struct CopyBeforeWriteFailureTests {
    private static let size = 4 << 20

    /// A disk of `0xaa` below a filter `filter` with a snapshot of it.
    private static func with<T: Sendable>(
        _ simulation: Simulation, _ options: JSONValue = [:],
        _ body:
            @escaping @Sendable (SimulatedGraph, _ guest: Edge, _ snapshot: Edge)
            async throws(BlockError) -> T
    ) async throws -> T {
        simulation.disk.addFile("/disk", bytes: [UInt8](repeating: 0xaa, count: size))
        simulation.disk.addFile("/temp", size: size)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            var object: JSONObject = [
                "driver": "copy-before-write", "node-name": "filter",
                "file": ["driver": "file", "filename": "/disk", "node-name": "disk"],
                "target": ["driver": "file", "filename": "/temp", "node-name": "temp"],
            ]
            if case .object(let more) = options {
                for (key, value) in more.members { object[key] = value }
            }
            try await setup.open(.object(object))
            try await setup.open(
                ["driver": "snapshot-access", "node-name": "frozen", "file": "filter"])
            return try await body(
                setup, try setup.use("filter"), try setup.use("frozen", .consistentRead))
        }
    }

    private static func flushes(_ edge: Edge, count: Int) async -> [BlockError.Code?] {
        var result: [BlockError.Code?] = []
        for _ in 0..<count {
            do throws(BlockError) {
                try await edge.flush()
                result.append(nil)
            } catch { result.append(error.code) }
        }
        return result
    }

    /// Closes everything, which tells once more of the flush that failed.
    private static func closeLosing(_ setup: SimulatedGraph, _ edges: Edge...) async {
        for edge in edges { try? await setup.leave(edge) }
        do throws(BlockError) {
            try await setup.graph.closeAll()
            Issue.record("the loss was not told at the end")
        } catch {
            #expect(error.code == .inputOutput)
        }
    }

    @Test(arguments: ["break-guest-write", "break-snapshot"])
    func aTargetThatCannotBeFlushedBreaksTheSnapshotAndNotTheDisk(policy: String) async throws {
        let simulation = Simulation(seed: 1, .calm)
        simulation.faults = [FaultRule(.synchronize, path: "/temp", .fail(EIO), times: 1)]
        let (codes, read) = try await Self.with(simulation, ["on-cbw-error": .string(policy)]) {
            setup, guest, snapshot throws(BlockError) in
            try await setup.write(guest, 0, 65536, 1)
            let codes = await Self.flushes(guest, count: 3)
            // What the guest flushed is there when the power goes.
            var random = SeededRandom(seed: 1)
            let survivor = simulation.disk.survivor(.everything, using: &random)
            #expect(survivor.bytes(of: "/disk")?.first == 1)
            var read: BlockError.Code?
            do throws(BlockError) {
                _ = try await setup.read(snapshot, 0, 65536)
            } catch { read = error.code }
            await Self.closeLosing(setup, guest, snapshot)
            return (codes, read)
        }
        #expect(codes == [nil, nil, nil])
        #expect(read == .permissionDenied)
    }

    @Test func aFailedFlushOfTheDiskIsToldEveryTime() async throws {
        let simulation = Simulation(seed: 1, .calm)
        simulation.faults = [FaultRule(.synchronize, path: "/disk", .fail(EIO), times: 1)]
        let codes = try await Self.with(simulation) { setup, guest, snapshot throws(BlockError) in
            let codes = await Self.flushes(guest, count: 2)
            await Self.closeLosing(setup, guest, snapshot)
            return codes
        }
        #expect(codes == [.inputOutput, .inputOutput])
    }

    @Test(arguments: [("break-guest-write", true), ("break-snapshot", false)])
    func aTargetWhoseFlushIsLateHoldsTheGuestUpForTheTimeoutOnly(
        policy: String, keepsSnapshot: Bool
    ) async throws {
        let simulation = Simulation(seed: 1, .calm)
        simulation.faults = [FaultRule(.synchronize, path: "/temp", .hang, times: 1)]
        let options: JSONValue = ["on-cbw-error": .string(policy), "cbw-timeout": 1]
        let (codes, isKept) = try await Self.with(simulation, options) {
            setup, guest, snapshot throws(BlockError) in
            let codes = await Self.flushes(guest, count: 2)
            let isKept = (try? await setup.read(snapshot, 0, 512)) == [0xaa]
            simulation.releaseHung()
            return (codes, isKept)
        }
        #expect(codes == [nil, nil])
        #expect(isKept == keepsSnapshot)
    }

    @Test func aClusterLargerThanMemoryIsWorthIsCopiedInPieces() async throws {
        var options = SimulationOptions.calm
        options.recordsTrace = true
        let simulation = Simulation(seed: 1, options)
        let read = try await Self.with(simulation, ["min-cluster-size": .integer(4 << 20)]) {
            setup, guest, snapshot throws(BlockError) in
            try await setup.write(guest, 1 << 20, 512, 1)
            return try await setup.read(snapshot, 1 << 20, 4096)
        }
        #expect(read == [0xaa])
        // Of a write: the file, the offset, where its part begins and ends in it, and the outcome.
        let ends = simulation.trace.compactMap { line -> Int? in
            let words = line.split(separator: " ")
            guard words.count > 6, words[1] == "file", words[2] == "write" else { return nil }
            return Int(words[6])
        }
        #expect(ends.max() == 1 << 20, "\(ends)")
        let copy = simulation.disk.bytes(of: "/temp") ?? []
        #expect(copy == [UInt8](repeating: 0xaa, count: Self.size))
    }

    /// Nanoseconds of the machine's clock that a guest's write takes which needs a copy, where all reads
    /// and writes could be made at once.
    private static func writeNanoseconds(_ options: JSONValue) async throws -> UInt64 {
        var behaviour = SimulationOptions.calm
        behaviour.immediatePerMille = 1000
        let simulation = Simulation(seed: 1, behaviour)
        return try await with(simulation, options) { setup, guest, _ throws(BlockError) in
            let start = setup.thread.now
            try await setup.write(guest, 0, 65536, 1)
            return setup.thread.now - start
        }
    }

    @Test func aTargetWithADeadlineIsNotWrittenOnTheThreadThatKeepsTheTime() async throws {
        #expect(try await Self.writeNanoseconds([:]) == 0)
        #expect(try await Self.writeNanoseconds(["cbw-timeout": 30]) > 0)
    }
}
