import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

/// Changes of an image's properties, on a disk that loses power at each of its writes and flushes in
/// turn: afterwards the image is as before or as after, with the same data, and leaks at worst.
///
/// Sizes are in `QCOW2ResizePowerTests`, snapshots in `QCOW2SnapshotPowerTests`.
@Suite struct QCOW2PowerCutTests {
    static let size = 300_032

    struct Change: Sendable, CustomTestStringConvertible {
        var name: String
        var clusterSize = 4096
        var version = "v3"
        var isLazy = false
        var hasSnapshot = true
        var creation: JSONObject = [:]
        var opening: JSONObject = [:]
        /// Beyond the data that every test writes.
        var prepare: @Sendable (Edge) async throws(BlockError) -> Void = {
            _ throws(BlockError) in
        }
        var carryOut: @Sendable (Edge) async throws(BlockError) -> Void
        /// What is so once the change is reported done, and may be so before; by what the driver tells.
        var isDone: @Sendable (Edge) async throws(BlockError) -> Bool = {
            _ throws(BlockError) in true
        }
        var testDescription: String { name }
    }

    private static func amendment(
        _ name: String, _ options: JSONValue, clusterSize: Int = 4096, version: String = "v3",
        isLazy: Bool = false, hasSnapshot: Bool = true, creation: JSONObject = [:],
        opening: JSONObject = [:],
        prepare: @escaping @Sendable (Edge) async throws(BlockError) -> Void = {
            _ throws(BlockError) in
        },
        isDone: @escaping @Sendable (JSONValue) -> Bool
    ) -> Change {
        Change(
            name: name, clusterSize: clusterSize, version: version, isLazy: isLazy,
            hasSnapshot: hasSnapshot, creation: creation, opening: opening, prepare: prepare,
            carryOut: { edge throws(BlockError) in
                try await QCOW2AmendTests.amend(edge, options)
            },
            isDone: { edge throws(BlockError) in
                isDone(try await edge.node.driver.information.formatSpecific?["data"] ?? [:])
            })
    }

    /// One after the other: the compiler takes its time over long lists of closures.
    static let changes: [Change] = {
        var changes: [Change] = []
        changes.append(
            amendment("refcounts of 64 bits", ["refcount-bits": 64]) { $0["refcount-bits"] == 64 })
        changes.append(
            amendment("refcounts of 2 bits", ["refcount-bits": 2], clusterSize: 512) {
                $0["refcount-bits"] == 2
            })
        changes.append(
            amendment("refcounts of 8 bits, late", ["refcount-bits": 8], isLazy: true) {
                $0["refcount-bits"] == 8
            })
        changes.append(
            amendment(
                "refcounts of 1 bit", ["refcount-bits": 1], clusterSize: 512, hasSnapshot: false
            ) { $0["refcount-bits"] == 1 })
        changes.append(
            amendment("version 3", ["version": "v3"], version: "v2") { $0["compat"] == "1.1" })
        changes.append(
            amendment(
                "version 2", ["version": "v2"], hasSnapshot: false,
                prepare: { edge throws(BlockError) in
                    try await edge.writeZeroes(ByteRange(8192, 30_000))
                    try await QCOW2SnapshotTests.fill(edge, 80_000..<90_000, 5)
                    try await edge.writeZeroes(ByteRange(200_000, 60_000), .mayUnmap)
                }
            ) { $0["compat"] == "0.10" })
        changes.append(
            amendment("late refcounts", ["lazy-refcounts": true]) { $0["lazy-refcounts"] == true })
        changes.append(
            amendment("no late refcounts", ["lazy-refcounts": false], isLazy: true) {
                $0["lazy-refcounts"] == false
            })
        changes.append(
            amendment(
                "a backing file", ["backing-file": "/base", "backing-fmt": "raw"],
                opening: ["backing": .null]
            ) { _ in true })
        changes.append(
            amendment(
                "a data file by another name", ["data-file": "/elsewhere", "data-file-raw": false],
                hasSnapshot: false,
                creation: QCOW2SimulationTests.merged(
                    QCOW2SimulationTests.dataFile, ["data-file-raw": true]),
                opening: QCOW2SimulationTests.dataFile
            ) { $0["data-file"] == "/elsewhere" && $0["data-file-raw"] == false })
        changes.append(
            amendment(
                "a second key",
                ["encrypt": ["state": "active", "new-secret": "other", "iter-time": 10]],
                creation: QCOW2SimulationTests.encryption, opening: QCOW2SimulationTests.key
            ) { data in
                guard case .array(let slots)? = data["encrypt"]?["slots"] else { return false }
                return slots.filter { $0["active"] == true }.count == 2
            })
        changes.append(
            amendment(
                "a key less", ["encrypt": ["state": "inactive", "old-secret": "other"]],
                creation: QCOW2SimulationTests.encryption, opening: QCOW2SimulationTests.key,
                prepare: { edge throws(BlockError) in
                    try await QCOW2AmendTests.amend(
                        edge,
                        ["encrypt": ["state": "active", "new-secret": "other", "iter-time": 10]])
                }
            ) { data in
                guard case .array(let slots)? = data["encrypt"]?["slots"] else { return false }
                return slots.filter { $0["active"] == true }.count == 1
            })
        changes.append(
            Change(
                name: "a bitmap stored by reopening",
                prepare: { edge throws(BlockError) in
                    try await edge.node.makeDirtyBitmap(
                        named: "b", granularity: 512, persistent: true)
                    try await edge.node.makeDirtyBitmap(
                        named: "c", granularity: 4096, persistent: true)
                },
                carryOut: { edge throws(BlockError) in
                    try await QCOW2SnapshotTests.fill(edge, 0..<512, 1)
                    try await edge.node.graph.reopen([QCOW2SimulatedImage.options()])
                },
                isDone: { edge throws(BlockError) in isStored(edge, "b") && isStored(edge, "c") }))
        changes.append(
            Change(
                name: "a bitmap removed",
                prepare: { edge throws(BlockError) in
                    try await edge.node.makeDirtyBitmap(
                        named: "b", granularity: 512, persistent: true)
                    try await edge.node.makeDirtyBitmap(
                        named: "c", granularity: 512, persistent: true)
                },
                carryOut: { edge throws(BlockError) in
                    guard let bitmap = edge.node.dirtyBitmap(named: "c") else { return }
                    try await edge.node.discardDirtyBitmap(bitmap)
                },
                isDone: { edge throws(BlockError) in edge.node.dirtyBitmap(named: "c") == nil }))
        return changes
    }()

    private static func isStored(_ edge: Edge, _ name: String) -> Bool {
        edge.node.dirtyBitmap(named: name)?.isInconsistent == false
    }

    final class Flag: @unchecked Sendable { var isSet = false }

    // MARK: The disk before and after

    private static func prepare(
        _ simulation: Simulation, _ change: Change
    ) async throws -> [UInt8] {
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: change.clusterSize, isLazy: change.isLazy, size: size,
            version: change.version, more: change.creation)
        return try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await QCOW2SimulatedImage.open(thread, change.opening)
            try await QCOW2SnapshotTests.fill(edge, 0..<60_000, 1)
            if change.hasSnapshot { try await QCOW2SnapshotTests.create(edge, "s") }
            try await QCOW2SnapshotTests.fill(edge, 50_000..<150_000, 2)
            try await change.prepare(edge)
            let contents = try await QCOW2SnapshotTests.everything(edge)
            await QCOW2SimulatedImage.close(graph, edge)
            return contents
        }
    }

    /// - Returns: what is wrong with what is left.
    private static func verify(
        _ simulation: Simulation, _ change: Change, _ contents: [UInt8], isDone: Bool
    ) async throws -> [String] {
        try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await QCOW2SimulatedImage.open(thread, change.opening)
            var wrong: [String] = []
            if isDone, try await !change.isDone(edge) { wrong.append("it was not done") }
            func check() async throws(BlockError) {
                if change.hasSnapshot {
                    let snapshot = try await QCOW2SnapshotTests.contents(edge, ofSnapshot: "s")
                    if snapshot[..<60_000].contains(where: { $0 != 1 })
                        || snapshot[60_000...].contains(where: { $0 != 0 })
                    {
                        wrong.append("the snapshot is damaged")
                    }
                }
            }
            if try await QCOW2SnapshotTests.everything(edge) != contents {
                wrong.append("the disk changed")
            }
            try await check()
            // Writes afterwards hurt nothing.
            try await QCOW2SnapshotTests.fill(edge, 0..<size, 9)
            try await edge.flush()
            if try await QCOW2SnapshotTests.everything(edge).contains(where: { $0 != 9 }) {
                wrong.append("a later write is lost")
            }
            try await check()
            await QCOW2SimulatedImage.close(graph, edge)
            return wrong
        }
    }

    @Test(arguments: changes) func aPowerCutLeavesTheImageAsBeforeOrAsAfter(
        change: Change
    ) async throws {
        for operation in [SimulatedOperation.write, .synchronize] {
            var cut = 0
            while cut < 300 {
                let simulation = Simulation(seed: UInt64(cut + 1))
                let contents = try await Self.prepare(simulation, change)
                simulation.faults = [
                    FaultRule(operation, path: "/disk", .crash, skip: cut, times: 1)
                ]
                let done = Flag()
                let outcome = try await simulation.boot { thread throws(BlockError) in
                    let (graph, edge) = try await QCOW2SimulatedImage.open(thread, change.opening)
                    try await change.carryOut(edge)
                    done.isSet = true
                    await QCOW2SimulatedImage.close(graph, edge)
                }
                simulation.faults = []
                let wrong = try await Self.verify(
                    simulation, change, contents, isDone: done.isSet)
                #expect(wrong == [], "\(change.name), cut at \(operation) \(cut)")
                try QCOW2SimulatedImage.check(simulation)
                if case .finished = outcome { break }
                // All of the first, then here and there.
                cut += cut < 12 ? 1 : 9
            }
            #expect(cut > 0 && cut < 300, "\(change.name)")
        }
    }
}
