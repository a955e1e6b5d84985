import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// qcow2 on disks that are full, whose flushes fail, and that lose power while the size changes.
@Suite struct QCOW2DiskFailureTests {
    static let size = 1 << 20

    // MARK: Full

    @Test(arguments: [512, 65536]) func aFullDiskFailsWritesAndNothingElse(clusterSize: Int)
        async throws
    {
        for seed in 1...8 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: clusterSize, isLazy: false)
            let full: [SimulatedOperation] = [.write, .setSize, .allocate]
            simulation.faults = full.map {
                FaultRule($0, path: "/disk", .fail(28), skip: Int(seed) * 5, times: 30)
            }
            let model = QCOW2SimulatedImage.Model()
            var options = RandomRequests.Options()
            options.mayFailWith = [.noSpace]
            let requests = options
            let (violations, failures) = try await simulation.run { thread throws(BlockError) in
                var failures = 0
                let violations = try await QCOW2SimulatedImage.use(thread) {
                    edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.run()
                    failures = run.failureCounts[.noSpace] ?? 0
                    // There is space again: what was written is there.
                    simulation.faults = []
                    await run.verify()
                    return run.violations
                }
                return (violations, failures)
            }
            #expect(violations == [], "seed \(seed)")
            #expect(failures > 0, "seed \(seed)")
            try QCOW2SimulatedImage.check(simulation)
        }
    }

    // MARK: Flushes

    @Test(arguments: [512, 65536]) func aFailedFlushIsToldUntilTheImageIsClosed(clusterSize: Int)
        async throws
    {
        var failedCount = 0
        for seed in 1...8 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: clusterSize, isLazy: false)
            simulation.faults = [
                FaultRule(.synchronize, path: "/disk", .fail(5), skip: Int(seed), times: 1)
            ]
            let model = QCOW2SimulatedImage.Model()
            var options = RandomRequests.Options()
            options.mayFailWith = [.inputOutput]
            let requests = options
            let violations = try await simulation.run { thread throws(BlockError) in
                try await QCOW2SimulatedImage.use(thread) { edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.run()
                    var wrong = run.violations
                    if run.failureCounts.isEmpty { return wrong + ["nothing failed"] }
                    do throws(BlockError) {
                        try await edge.flush()
                        wrong.append("a flush after a failed one succeeded")
                    } catch {
                        // As it has to be.
                    }
                    return wrong
                }
            }
            if violations == ["nothing failed"] { continue }
            failedCount += 1
            #expect(violations == [], "seed \(seed)")
            // What flushes acknowledged before is there, whatever became of the rest.
            simulation.faults = []
            model.shadow.crash()
            let left = try await simulation.run { thread throws(BlockError) in
                try await QCOW2SimulatedImage.use(thread) { edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.verify()
                    return run.violations
                }
            }
            #expect(left == [], "seed \(seed)")
            try QCOW2SimulatedImage.check(simulation)
        }
        #expect(failedCount > 0)
    }

    // MARK: Chains

    /// The image over another, over a raw one.
    static func openChain(_ thread: IOThread) async throws(BlockError) -> (BlockGraph, Edge) {
        let graph = BlockGraph(on: thread, registry: QCOW2SimulatedImage.registry)
        let base: JSONValue = ["driver": "file", "filename": "/base", "locking": "off"]
        let node = try await graph.open(
            [
                "driver": "qcow2", "node-name": "image", "discard": "unmap",
                "l2-cache-size": 1024, "l2-cache-entry-size": 512, "cache-clean-interval": 0,
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
                "backing": [
                    "driver": "qcow2", "read-only": true, "backing": base,
                    "cache-clean-interval": 0,
                    "file": ["driver": "file", "filename": "/middle", "locking": "off"],
                ],
            ], monitorOwned: true)
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: [.consistentRead, .write], shares: .all))
        return (graph, edge)
    }

    @Test(arguments: [(512, 4096), (65536, 512), (4096, 65536)])
    func chainsOfImagesSurvivePowerLoss(clusters: (Int, Int)) async throws {
        for seed in 1...6 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            var contents = (0..<Self.size).map { UInt8(truncatingIfNeeded: $0 / 700 + 1) }
            simulation.disk.addFile("/base", bytes: Array(contents[..<700_000]))
            contents.replaceSubrange(700_000..., with: repeatElement(0, count: Self.size - 700_000))
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: clusters.1, isLazy: false, path: "/middle")
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: clusters.0, isLazy: false)
            // Into the middle, before the chain is there.
            try await simulation.run { thread throws(BlockError) in
                let graph = BlockGraph(on: thread, registry: QCOW2SimulatedImage.registry)
                let node = try await graph.open(
                    [
                        "driver": "qcow2",
                        "backing": ["driver": "file", "filename": "/base", "locking": "off"],
                        "file": ["driver": "file", "filename": "/middle", "locking": "off"],
                    ], monitorOwned: false)
                let edge = try graph.attach(
                    NamedUser("test"), to: node, Access(uses: .write, shares: .all))
                node.release("opening")
                try await QCOW2SnapshotTests.fill(edge, 100_000..<300_000, 99)
                try await graph.detach(edge)
            }
            contents.replaceSubrange(100_000..<300_000, with: repeatElement(99, count: 200_000))
            let model = Shadow(contents)
            simulation.options.crashNanoseconds = 3_000_000 + seed * 27_000_000
            let outcome = try await simulation.boot { thread throws(BlockError) in
                let (graph, edge) = try await Self.openChain(thread)
                let run = RandomRequests(edge, model.disk, seed: seed)
                await run.run()
                await QCOW2SnapshotPowerTests.close(graph, edge)
                return run.violations
            }
            if case .finished(let violations) = outcome {
                #expect(violations == [], "seed \(seed)")
            } else {
                model.disk.crash()
            }
            simulation.options.crashNanoseconds = nil
            let violations = try await simulation.run { thread throws(BlockError) in
                let (graph, edge) = try await Self.openChain(thread)
                let run = RandomRequests(edge, model.disk, seed: seed)
                await run.verify()
                await QCOW2SnapshotPowerTests.close(graph, edge)
                return run.violations
            }
            #expect(violations == [], "seed \(seed)")
            try QCOW2SimulatedImage.check(simulation)
        }
    }

    final class Shadow: @unchecked Sendable {
        let disk: ShadowDisk
        init(_ bytes: [UInt8]) { disk = ShadowDisk(bytes: bytes) }
    }
}

/// Another size, on a disk that loses power at each of its writes and flushes in turn.
@Suite struct QCOW2ResizePowerTests {
    struct Case: Sendable, CustomTestStringConvertible {
        var clusterSize: Int
        var from: Int
        var to: Int
        var hasBacking = false
        var hasSnapshot = false
        var testDescription: String {
            "clusters of \(clusterSize): \(from) → \(to), backing \(hasBacking), "
                + "snapshot \(hasSnapshot)"
        }
    }

    static let cases: [Case] = [
        Case(clusterSize: 65536, from: 300_032, to: 700_416),
        // The L1 table moves.
        Case(clusterSize: 512, from: 300_032, to: 3_000_320),
        Case(clusterSize: 4096, from: 300_032, to: 500_224, hasBacking: true),
        Case(clusterSize: 512, from: 300_032, to: 2_500_096, hasSnapshot: true),
        Case(clusterSize: 65536, from: 700_416, to: 300_032),
        Case(clusterSize: 512, from: 700_416, to: 30_208, hasBacking: true),
        Case(clusterSize: 4096, from: 700_416, to: 30_208, hasSnapshot: true),
    ]

    static func open(
        _ thread: IOThread, _ test: Case
    ) async throws(BlockError) -> (BlockGraph, Edge) {
        let graph = BlockGraph(on: thread, registry: QCOW2SimulatedImage.registry)
        let backing: JSONValue =
            test.hasBacking ? ["driver": "file", "filename": "/base", "locking": "off"] : .null
        let node = try await graph.open(
            [
                "driver": "qcow2", "node-name": "image", "discard": "unmap", "backing": backing,
                "cache-clean-interval": 0,
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], monitorOwned: true)
        let edge = try graph.attach(
            NamedUser("test"), to: node,
            Access(uses: [.consistentRead, .write, .resize], shares: .all))
        return (graph, edge)
    }

    static func prepare(_ simulation: Simulation, _ test: Case) async throws -> [UInt8] {
        simulation.disk.addFile("/base", bytes: [UInt8](repeating: 7, count: 4 << 20))
        try await QCOW2SimulatedImage.create(
            simulation, clusterSize: test.clusterSize, isLazy: false, size: test.from)
        return try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await open(thread, test)
            try await QCOW2SnapshotTests.fill(edge, 10_000..<60_000, 1)
            if test.hasSnapshot { try await QCOW2SnapshotTests.create(edge, "s") }
            try await QCOW2SnapshotTests.fill(edge, test.from - 20_000..<test.from, 2)
            let contents = try await QCOW2SnapshotTests.everything(edge)
            await QCOW2SnapshotPowerTests.close(graph, edge)
            return contents
        }
    }

    /// - Returns: what is wrong with what is left.
    static func verify(
        _ simulation: Simulation, _ test: Case, _ contents: [UInt8], isDone: Bool
    ) async throws -> [String] {
        try await simulation.run { thread throws(BlockError) in
            let (graph, edge) = try await open(thread, test)
            var wrong: [String] = []
            if edge.size != test.to, isDone || edge.size != test.from {
                wrong.append("the size is \(edge.size)")
            }
            func check(_ kept: Int) async throws(BlockError) {
                let found = try await QCOW2SnapshotTests.everything(edge)
                if found[..<kept] != contents[..<kept] { wrong.append("the disk changed") }
                if found[kept...].contains(where: { $0 != 0 }) {
                    wrong.append("what is new is not zero")
                }
            }
            var kept = min(edge.size, test.from)
            try await check(kept)
            // Once more, to where stale data could show.
            kept = min(kept, test.to)
            try await edge.resize(to: test.to)
            try await check(kept)
            try await edge.resize(to: max(test.from, test.to) + 100_352)
            try await check(kept)
            if test.hasSnapshot {
                let snapshot = try await QCOW2SnapshotTests.contents(edge, ofSnapshot: "s")
                if snapshot.count != test.from
                    || snapshot[10_000..<60_000].contains(where: { $0 != 1 })
                {
                    wrong.append("the snapshot changed")
                }
            }
            await QCOW2SnapshotPowerTests.close(graph, edge)
            return wrong
        }
    }

    final class Flag: @unchecked Sendable { var isSet = false }

    @Test(arguments: cases) func aPowerCutLeavesOneSizeOrTheOther(test: Case) async throws {
        for operation in [SimulatedOperation.write, .synchronize] {
            var cut = 0
            while cut < 400 {
                let simulation = Simulation(seed: UInt64(cut + 1))
                let contents = try await Self.prepare(simulation, test)
                simulation.faults = [
                    FaultRule(operation, path: "/disk", .crash, skip: cut, times: 1)
                ]
                let done = Flag()
                let outcome = try await simulation.boot { thread throws(BlockError) in
                    let (graph, edge) = try await Self.open(thread, test)
                    try await edge.resize(to: test.to)
                    done.isSet = true
                    await QCOW2SnapshotPowerTests.close(graph, edge)
                }
                simulation.faults = []
                try QCOW2SimulatedImage.check(simulation)
                let wrong = try await Self.verify(
                    simulation, test, contents, isDone: done.isSet)
                #expect(wrong == [], "\(test), cut at \(operation) \(cut)")
                try QCOW2SimulatedImage.check(simulation)
                if case .finished = outcome { break }
                cut += cut < 20 ? 1 : 7
            }
            #expect(cut > 0 && cut < 400)
        }
    }
}
