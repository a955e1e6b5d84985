import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// Dirty bitmaps of an image on a disk that loses power.
@Suite struct QCOW2BitmapSimulationTests {
    /// What goes from boot to boot, one thread at a time.
    private final class Model: @unchecked Sendable {
        let shadow = ShadowDisk(size: QCOW2SimulatedImage.size)
        /// All changes since the bitmap was made.
        var changes: DirtyBitmap?
    }

    static let granularity = 4096

    /// - Returns: what is wrong with the stored bitmap.
    private static func checkStored(_ edge: Edge, _ model: Model) async -> [String] {
        for bitmap in edge.node.dirtyBitmaps { await bitmap.load() }
        guard let bitmap = edge.node.dirtyBitmap(named: "b"), !bitmap.isInconsistent else {
            return []
        }
        guard let changes = model.changes else { return ["a bitmap that nobody made"] }
        var stored: [ByteRange] = []
        var expected: [ByteRange] = []
        bitmap.forEachDirtyRange { stored.append($0) }
        changes.forEachDirtyRange { expected.append($0) }
        return stored == expected ? [] : ["stored \(stored), changed \(expected)"]
    }

    /// Goes on with the bitmap that is there, or makes a new one.
    private static func goOn(_ edge: Edge, _ model: Model) async throws(BlockError) {
        let node = edge.node
        if let bitmap = node.dirtyBitmap(named: "b") {
            if bitmap.isInconsistent { try await node.discardDirtyBitmap(bitmap) }
        }
        if node.dirtyBitmap(named: "b") == nil {
            model.changes = try DirtyBitmap(
                name: "all", granularity: granularity, size: node.size)
            try await node.makeDirtyBitmap(
                named: "b", granularity: granularity, persistent: true)
        }
        if let changes = model.changes { node.addWriteObserver(changes) }
    }

    @Test(arguments: [512, 4096, 65536]) func afterPowerLossNoBitmapIsStaleAndValid(
        clusterSize: Int
    ) async throws {
        var survivors = 0
        for seed in 1...12 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: clusterSize, isLazy: seed % 4 == 0)
            let model = Model()
            for boot in 1...4 as ClosedRange<UInt64> {
                simulation.options.crashNanoseconds =
                    boot == 1 || (seed + boot) % 3 == 0
                    ? nil : 2_000_000 + (seed * 37 + boot * 11) % 90 * 1_000_000
                var options = RandomRequests.Options()
                options.count = 20 + Int(seed * boot) % 60
                let requests = options
                let outcome = try await simulation.boot { thread throws(BlockError) in
                    try await QCOW2SimulatedImage.use(thread) { edge throws(BlockError) in
                        let wrong = await Self.checkStored(edge, model)
                        try await Self.goOn(edge, model)
                        let run = RandomRequests(edge, model.shadow, seed: seed + boot, requests)
                        await run.run()
                        return wrong + run.violations
                    }
                }
                if case .finished(let violations) = outcome {
                    #expect(violations == [], "seed \(seed), boot \(boot)")
                } else {
                    model.shadow.crash()
                }
            }
            simulation.options.crashNanoseconds = nil
            let wrong = try await simulation.run { thread throws(BlockError) in
                try await QCOW2SimulatedImage.use(thread) { edge throws(BlockError) in
                    let isThere = edge.node.dirtyBitmap(named: "b")?.isInconsistent == false
                    return await Self.checkStored(edge, model) + (isThere ? ["there"] : [])
                }
            }
            #expect(wrong.filter { $0 != "there" } == [], "seed \(seed)")
            if wrong.contains("there") { survivors += 1 }
            try QCOW2SimulatedImage.check(simulation)
        }
        // The test would see nothing if no bitmap ever came back.
        #expect(survivors > 0)
    }
}
