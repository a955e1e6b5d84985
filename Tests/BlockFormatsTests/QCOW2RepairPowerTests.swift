import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

/// Repairs, on a disk that loses power at each of their writes and flushes in turn: the next repair
/// finishes the work, and no data is lost meanwhile.
@Suite struct QCOW2RepairPowerTests {
    static let size = 300_032

    struct Damage: Sendable, CustomTestStringConvertible {
        var name: String
        var repair = CheckRepair.all
        var does: @Sendable (inout QCOW2Bytes) -> Void
        var testDescription: String { name }
    }

    /// None of them takes anything away that is not there twice.
    static let damages: [Damage] = {
        var damages: [Damage] = []
        damages.append(
            Damage(name: "leaks", repair: .leaks) { bytes in
                leak(&bytes, count: 1)
            })
        damages.append(
            Damage(name: "leaks, with all else") { bytes in
                leak(&bytes, count: 2)
            })
        damages.append(
            Damage(name: "counts that are too low") { bytes in
                for cluster in 0..<60 { bytes.setCount(cluster, 0) }
            })
        damages.append(
            Damage(name: "a refcount block that is nowhere") { bytes in
                bytes.set(Int(bytes.number(48)), 1 << 50 | 512)
            })
        damages.append(
            Damage(name: "no refcount block") { bytes in bytes.set(Int(bytes.number(48)), 0) })
        damages.append(
            Damage(name: "wrong COPIED flags") { bytes in
                for index in 0..<40 where bytes.number(bytes.entry(index)) != 0 {
                    bytes.set(bytes.entry(index), bytes.number(bytes.entry(index)) ^ 1 << 63)
                }
            })
        damages.append(
            Damage(name: "a broken directory of bitmaps") { bytes in
                guard let place = bytes.bitmapDirectory else { return }
                bytes.set(place + 16, .max)
            })
        damages.append(
            Damage(name: "reserved bits in the L1 table") { bytes in
                bytes.set(bytes.l1, bytes.number(bytes.l1) | 3)
            })
        damages.append(
            Damage(name: "marked dirty and corrupt, with leaks") { bytes in
                bytes.set(72, 3)
                leak(&bytes, count: 1)
            })
        return damages
    }()

    /// Counts clusters past all that is used, which the file is made to have.
    private static func leak(_ bytes: inout QCOW2Bytes, count: UInt16) {
        let first = (bytes.bytes.count + 4095) / 4096 + 10
        let end = (first + 30) * 4096
        bytes.bytes += [UInt8](repeating: 0, count: end - bytes.bytes.count)
        for cluster in first..<(first + 30) { bytes.setCount(cluster, count) }
    }

    private static func prepare(
        _ simulation: Simulation, _ damage: Damage
    ) async throws -> [UInt8] {
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: 4096, isLazy: false, size: size)
        let contents = try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await QCOW2SimulatedImage.open(thread)
            try await QCOW2SnapshotTests.fill(edge, 0..<60_000, 1)
            try await QCOW2SnapshotTests.create(edge, "s")
            try await edge.node.makeDirtyBitmap(named: "b", granularity: 512, persistent: true)
            try await QCOW2SnapshotTests.fill(edge, 50_000..<150_000, 2)
            let contents = try await QCOW2SnapshotTests.everything(edge)
            await QCOW2SimulatedImage.close(graph, edge)
            return contents
        }
        var bytes = QCOW2Bytes(bytes: simulation.disk.bytes(of: "/disk") ?? [])
        damage.does(&bytes)
        simulation.disk.addFile("/disk", bytes: bytes.bytes)
        return contents
    }

    @Test(arguments: damages) func theNextRepairFinishesWhatAPowerCutLeft(
        damage: Damage
    ) async throws {
        for operation in [SimulatedOperation.write, .synchronize] {
            var cut = 0
            while cut < 200 {
                let simulation = Simulation(seed: UInt64(cut + 1))
                let contents = try await Self.prepare(simulation, damage)
                simulation.faults = [
                    FaultRule(operation, path: "/disk", .crash, skip: cut, times: 1)
                ]
                let outcome = try await simulation.boot { thread throws(BlockError) in
                    try await QCOW2SimulatedImage.mend(thread, damage.repair)
                }
                simulation.faults = []
                if case .finished(let report) = outcome {
                    #expect(report.leaksFixed + report.corruptionsFixed > 0, "\(damage)")
                    try QCOW2SimulatedImage.check(simulation)
                }
                let report = try await simulation.run { thread throws(BlockError) in
                    try await QCOW2SimulatedImage.mend(thread, .all)
                }
                #expect(report.isClean, "\(damage.name), cut at \(operation) \(cut)")
                try QCOW2SimulatedImage.check(simulation)
                let wrong = try await simulation.run { thread throws(BlockError) in
                    let (graph, edge) = try await QCOW2SimulatedImage.open(thread)
                    var wrong: [String] = []
                    if try await QCOW2SnapshotTests.everything(edge) != contents {
                        wrong.append("the disk changed")
                    }
                    let snapshot = try await QCOW2SnapshotTests.contents(edge, ofSnapshot: "s")
                    if snapshot[..<60_000].contains(where: { $0 != 1 }) {
                        wrong.append("the snapshot is damaged")
                    }
                    await QCOW2SimulatedImage.close(graph, edge)
                    return wrong
                }
                #expect(wrong == [], "\(damage.name), cut at \(operation) \(cut)")
                if case .finished = outcome { break }
                cut += cut < 12 ? 1 : 7
            }
            #expect(cut > 0 && cut < 200, "\(damage.name)")
        }
    }
}
