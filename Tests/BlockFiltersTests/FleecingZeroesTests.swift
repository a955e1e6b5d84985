import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// Long changes of disks that are mostly zeroes.
@Suite struct FleecingZeroesTests {
    private static let cluster = 65536
    private static let size = 64 << 30

    /// Runs `body` with a disk that has some data at its start, in its middle and at its end.
    private static func with<T: Sendable>(
        _ body:
            @escaping @Sendable (SimulatedGraph, _ guest: Edge, _ snapshot: Edge)
            async throws(BlockError) -> T
    ) async throws -> T {
        let simulation = Simulation(seed: 1)
        for name in ["/disk", "/temp"] { simulation.disk.addFile(name, size: 0) }
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            for name in ["/disk", "/temp"] { try await setup.createQCOW2(name, size: size) }
            func image(_ path: String, _ name: String) -> JSONValue {
                [
                    "driver": "qcow2", "node-name": .string(name), "discard": "unmap",
                    "file": ["driver": "file", "filename": .string(path)],
                ]
            }
            try await setup.open(image("/disk", "disk"))
            let disk = try setup.use("disk")
            for offset in places { try await setup.write(disk, offset, 1000, 7) }
            try await setup.leave(disk)
            try await setup.open([
                "driver": "copy-before-write", "node-name": "filter", "file": "disk",
                "target": image("/temp", "temp"), "discard": "unmap",
            ])
            try await setup.open(
                ["driver": "snapshot-access", "node-name": "frozen", "file": "filter"])
            return try await body(
                setup, try setup.use("filter"), try setup.use("frozen", .consistentRead))
        }
    }

    private static let places = [0, 3 * cluster + 500, 1 << 30, (5 << 30) + cluster, size - 1000]

    @Test(arguments: [false, true])
    func theSnapshotKeepsTheDataAndTheZeroes(_ discards: Bool) async throws {
        try await Self.with { (setup, guest, snapshot) throws(BlockError) in
            let all = ByteRange(0, Self.size)
            if discards { try await guest.discard(all) } else { try await guest.writeZeroes(all) }
            for offset in Self.places {
                #expect(try await setup.read(guest, offset, 1000) == [0])
                #expect(try await setup.read(snapshot, offset, 1000) == [7])
                let after = min(offset + 1000, Self.size - 1000)
                if after < offset + 1000 { continue }
                #expect(try await setup.read(snapshot, after, Self.cluster) == [0])
            }
        }
    }

    @Test func othersGetTheirTurnDuringALongChange() async throws {
        let turnCount = try await Self.with { (setup, guest, _) throws(BlockError) in
            final class Count: @unchecked Sendable {
                var turns = 0
                var isOver = false
            }
            let count = Count()
            setup.thread.spawn {
                while !count.isOver {
                    count.turns += 1
                    await Task.yield()
                }
            }
            try await guest.writeZeroes(ByteRange(0, Self.size))
            count.isOver = true
            return count.turns
        }
        // One for each GiB that is noted as zeroes, at least.
        #expect(turnCount >= 60)
    }
}
