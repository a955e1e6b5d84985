import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFilters

/// How reads of a snapshot go: side by side where they can, at once where nothing is to be waited for, and in
/// nobody's way who does not touch their clusters.
@Suite struct SnapshotReadTests {
    private static let cluster = 65536

    /// Runs `body` on a machine whose page cache has everything, with a disk of `0xaa` and its snapshot.
    private static func with<T: Sendable>(
        _ body:
            @escaping @Sendable (Simulation, SimulatedGraph, _ guest: Edge, _ snapshot: Edge)
            async throws(BlockError) -> T
    ) async throws -> T {
        var options = SimulationOptions.calm
        options.immediatePerMille = 1000
        let simulation = Simulation(seed: 1, options)
        simulation.disk.addFile("/disk", bytes: [UInt8](repeating: 0xaa, count: 16 * cluster))
        simulation.disk.addFile("/temp", size: 16 * cluster)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            try await setup.open(
                [
                    "driver": "copy-before-write", "node-name": "filter",
                    "file": ["driver": "file", "filename": "/disk", "node-name": "disk"],
                    "target": ["driver": "file", "filename": "/temp", "node-name": "temp"],
                ])
            try await setup.open(
                ["driver": "snapshot-access", "node-name": "frozen", "file": "filter"])
            return try await body(
                simulation, setup, try setup.use("filter"),
                try setup.use("frozen", .consistentRead))
        }
    }

    @Test func copiedAndUncopiedClustersAreReadSideBySide() async throws {
        let (hungCount, read) = try await Self.with {
            (simulation, setup, guest, snapshot) throws(BlockError) in
            try await setup.write(guest, Self.cluster, Self.cluster, 1)
            simulation.faults = [
                FaultRule(.read, path: "/temp", .hang, times: 1),
                FaultRule(.read, path: "/disk", .hang, times: 1),
            ]
            let reading = Task(executorPreference: setup.thread) {
                // The first of them is copied.
                try? await setup.read(snapshot, Self.cluster, 3 * Self.cluster)
            }
            await setup.thread.sleep(nanoseconds: 1_000_000_000)
            let hungCount = simulation.hungCount
            simulation.releaseHung()
            return (hungCount, await reading.value)
        }
        #expect(hungCount == 2)
        #expect(read == [0xaa])
    }

    @Test func whatIsPartlyCopiedIsReadAtOnce() async throws {
        let (passed, read) = try await Self.with { (_, setup, guest, snapshot) throws(BlockError) in
            for index in [1, 2, 4] {
                try await setup.write(guest, index * Self.cluster, Self.cluster, 1)
            }
            let data = try IOVector(allocating: 6 * Self.cluster)
            return (snapshot.readNow(0, into: data), Set(data.array))
        }
        #expect(passed)
        #expect(read == [0xaa])
    }

    @Test func aReadInFlightHoldsUpOnlyGuestWritesToItsClusters() async throws {
        let (beside, within, isWritten, read) = try await Self.with {
            (simulation, setup, guest, snapshot) throws(BlockError) in
            try await setup.write(guest, 4 * Self.cluster, Self.cluster, 1)
            simulation.faults = [FaultRule(.read, path: "/disk", .hang, times: 1)]
            let reading = Task(executorPreference: setup.thread) {
                try? await setup.read(snapshot, 0, Self.cluster)
            }
            await setup.thread.sleep(nanoseconds: 1_000_000_000)
            final class Progress: @unchecked Sendable { var isWritten = false }
            let progress = Progress()
            // Copies the cluster, and waits for the read.
            let writing = setup.thread.spawn {
                try? await setup.write(guest, 0, 512, 2)
                progress.isWritten = true
            }
            await setup.thread.sleep(nanoseconds: 1_000_000_000)
            let data = try IOVector(allocating: 512)
            data.fill(3)
            let beside = guest.writeNow(4 * Self.cluster, from: data)
            let within = guest.writeNow(1024, from: data)
            let isWritten = progress.isWritten
            simulation.releaseHung()
            await writing.value
            return (beside, within, isWritten, await reading.value)
        }
        #expect(beside && !within && !isWritten)
        #expect(read == [0xaa])
    }
}
