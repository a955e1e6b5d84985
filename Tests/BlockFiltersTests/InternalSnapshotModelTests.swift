import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

/// A snapshot inside an image, read through snapshot-access while everything around it changes.
@Suite struct InternalSnapshotModelTests {
    static let registry = DriverRegistry(
        BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)
    static let size = 600_064
    static let date = SnapshotDate(seconds: 1, nanoseconds: 2)

    static func create(_ simulation: Simulation, clusterSize: Int) async throws {
        simulation.disk.addFile("/disk", size: 0)
        simulation.disk.addFile(
            "/base", bytes: (0..<400_000).map { UInt8(truncatingIfNeeded: $0 / 1000 + 1) })
        try await simulation.run { thread throws(BlockError) in
            let graph = BlockGraph(on: thread, registry: registry)
            let options: JSONValue = [
                "size": .integer(size), "cluster-size": .integer(clusterSize),
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ]
            let creation = ImageCreation(graph, options: try OptionReader(options, of: "creation"))
            guard let create = try registry.driver(named: "qcow2").create else { return }
            try await create(creation)
            try await creation.finish()
        }
    }

    /// The image, and what runs on it until it is told to stop.
    final class Scene: @unchecked Sendable {
        let graph: BlockGraph
        let edge: Edge
        var random: SeededRandom
        var wrong: [String] = []
        var isOver = false
        var running = 0
        var sleeper: UnsafeContinuation<Void, Never>?

        init(_ graph: BlockGraph, _ edge: Edge, seed: UInt64) {
            self.graph = graph
            self.edge = edge
            random = SeededRandom(seed: seed)
        }

        func start(_ name: String, _ body: @escaping @Sendable () async throws(BlockError) -> Void)
        {
            running += 1
            edge.node.thread.spawn {
                do throws(BlockError) {
                    try await body()
                } catch {
                    self.wrong.append("\(name): \(error)")
                }
                self.running -= 1
                if self.running == 0 { self.sleeper?.resume() }
            }
        }

        func untilAllEnded() async {
            if running > 0 { await withUnsafeContinuation { sleeper = $0 } }
        }

        /// One write, zeroing or discard; the disk may shrink meanwhile.
        func change() async throws(BlockError) {
            let offset = random.below(max(1, edge.size - 1))
            let count = min(
                1 + random.below(random.chance(500) ? 4000 : 60_000), edge.size - offset)
            let range = ByteRange(offset, max(0, count))
            let kind = random.below(5)
            do throws(BlockError) {
                switch kind {
                case 0: try await edge.writeZeroes(range, .mayUnmap)
                case 1: try await edge.discard(range)
                case 2 where random.chance(300): try await edge.flush()
                default:
                    let vector = try IOVector(allocating: range.count)
                    vector.fill(UInt8(random.below(256)))
                    try await edge.write(range.offset, from: vector)
                }
            } catch  where error.code == .outOfRange {}
        }

        /// Another snapshot comes or goes.
        func turnSnapshots(_ step: Int) async throws(BlockError) {
            let store = try edge.node.requireSnapshotStore()
            let others = store.internalSnapshots.filter { $0.name != "kept" }
            if others.count < 3, random.chance(600) {
                _ = try await graph.createSnapshot("other\(step)", of: edge.node, at: date)
            } else if let other = others.randomElement(using: &random) {
                if random.chance(300) {
                    try await graph.applySnapshot(other.identifier, of: edge.node)
                } else {
                    try await graph.deleteSnapshot(other.identifier, of: edge.node)
                }
            }
        }

        /// Reads a part of the view, and its status, and compares.
        func look(_ view: Edge, _ expected: [UInt8]) async throws(BlockError) {
            let offset = random.below(expected.count)
            let range = ByteRange(offset, 1 + random.below(min(50_000, expected.count - offset)))
            let vector = try IOVector(allocating: range.count)
            vector.fill(0xa5)
            try await view.read(range.offset, into: vector)
            if vector.array[...] != expected[range.offset..<range.end] {
                wrong.append("a read of \(range) differs")
            }
            let status = try await view.blockStatus(range)
            let covered = expected[range.offset..<(range.offset + status.count)]
            if status.flags.contains(.zero), covered.contains(where: { $0 != 0 }) {
                wrong.append("status of \(range) calls data zero")
            }
            if view.size != expected.count { wrong.append("the view's size is \(view.size)") }
        }
    }

    static func everything(_ edge: Edge) async throws(BlockError) -> [UInt8] {
        let vector = try IOVector(allocating: edge.size)
        try await edge.read(0, into: vector)
        return vector.array
    }

    static func open(
        _ thread: IOThread, seed: UInt64, hasBacking: Bool
    ) async throws(BlockError) -> Scene {
        let graph = BlockGraph(on: thread, registry: registry)
        let backing: JSONValue =
            hasBacking ? ["driver": "file", "filename": "/base", "locking": "off"] : .null
        let node = try await graph.open(
            [
                "driver": "qcow2", "node-name": "disk", "discard": "unmap",
                "l2-cache-size": 1024, "l2-cache-entry-size": 512, "cache-clean-interval": 0,
                "backing": backing,
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], monitorOwned: true)
        let edge = try graph.attach(
            NamedUser("guest"), to: node,
            Access(uses: [.consistentRead, .write, .resize], shares: .all))
        return Scene(graph, edge, seed: seed)
    }

    @Test(arguments: 1...8 as ClosedRange<UInt64>)
    func whatIsExportedStaysTheSameWhateverHappensAround(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        try await Self.create(simulation, clusterSize: [512, 4096, 65536][Int(seed) % 3])
        let wrong = try await simulation.run { thread throws(BlockError) in
            let scene = try await Self.open(thread, seed: seed, hasBacking: seed % 2 == 0)
            let (graph, edge) = (scene.graph, scene.edge)
            for _ in 0..<30 { try await scene.change() }
            _ = try await graph.createSnapshot("kept", of: edge.node, at: Self.date)
            let expected = try await Self.everything(edge)
            let node = try await graph.open(
                [
                    "driver": "snapshot-access", "node-name": "view", "file": "disk",
                    "snapshot-name": "kept",
                ], monitorOwned: true)
            let view = try graph.attach(NamedUser("reader"), to: node, .read)
            for _ in 0..<4 {
                scene.start("guest") { () throws(BlockError) in
                    while !scene.isOver { try await scene.change() }
                }
            }
            for _ in 0..<2 {
                scene.start("reader") { () throws(BlockError) in
                    while !scene.isOver { try await scene.look(view, expected) }
                }
            }
            for step in 0..<12 {
                for _ in 0..<10 { try await scene.look(view, expected) }
                if scene.random.chance(700) {
                    try await scene.turnSnapshots(step)
                } else {
                    let size = Self.size / 2 + scene.random.below(Self.size)
                    try await edge.resize(to: size & ~511)
                }
            }
            scene.isOver = true
            await scene.untilAllEnded()
            if try await Self.everything(view) != expected { scene.wrong.append("the end differs") }
            try await graph.detach(view)
            try await graph.detach(edge)
            try await graph.closeAll()
            return scene.wrong
        }
        #expect(wrong == [], "seed \(seed)")
        // Opened anew it is what it was, and nothing leaks.
        let (left, size) = try await simulation.run { thread throws(BlockError) in
            let scene = try await Self.open(thread, seed: seed, hasBacking: seed % 2 == 0)
            let names = try scene.edge.node.requireSnapshotStore().internalSnapshots.map(\.name)
            let size = scene.edge.size
            try await scene.graph.detach(scene.edge)
            try await scene.graph.closeAll()
            return (names, size)
        }
        #expect(left.contains("kept") && size > 0)
    }

    @Test func noSnapshotIsAppliedUnderAFrozenView() async throws {
        let simulation = Simulation(seed: 1)
        try await Self.create(simulation, clusterSize: 4096)
        simulation.disk.addFile("/temp", size: Self.size)
        let error = try await simulation.run { thread throws(BlockError) in
            let graph = BlockGraph(on: thread, registry: Self.registry)
            let disk = try await graph.open(
                [
                    "driver": "qcow2", "node-name": "disk", "cache-clean-interval": 0,
                    "file": ["driver": "file", "filename": "/disk", "locking": "off"],
                ], monitorOwned: true)
            let kept = try await graph.createSnapshot("kept", of: disk, at: Self.date)
            _ = try await graph.open(
                [
                    "driver": "copy-before-write", "node-name": "filter", "file": "disk",
                    "target": ["driver": "file", "filename": "/temp", "locking": "off"],
                ], monitorOwned: true)
            var error: BlockError?
            do throws(BlockError) {
                try await graph.applySnapshot(kept.identifier, of: disk)
            } catch let refusal { error = refusal }
            try await graph.closeAll()
            return error
        }
        #expect(error?.code == .permissionDenied, "\(error.map { "\($0)" } ?? "applied")")
    }

    @Test func aSnapshotInUseIsNeitherDeletedNorAppliedNorIsAnotherTaken() async throws {
        let simulation = Simulation(seed: 1)
        try await Self.create(simulation, clusterSize: 4096)
        let (messages, unknown) = try await simulation.run { thread throws(BlockError) in
            let scene = try await Self.open(thread, seed: 1, hasBacking: false)
            let (graph, disk) = (scene.graph, scene.edge.node)
            let kept = try await graph.createSnapshot("kept", of: disk, at: Self.date)
            let view = try await graph.open(
                [
                    "driver": "snapshot-access", "node-name": "view", "file": "disk",
                    "snapshot-id": .string(kept.identifier), "snapshot-name": "kept",
                ], monitorOwned: true)
            var messages: [String] = []
            do throws(BlockError) {
                try await graph.deleteSnapshot(kept.identifier, of: disk)
            } catch { messages.append("\(error.code) \(error.message)") }
            do throws(BlockError) {
                try await graph.applySnapshot(kept.identifier, of: disk)
            } catch { messages.append("\(error.code) \(error.message)") }
            var unknown: BlockError?
            do throws(BlockError) {
                _ = try await graph.open(
                    ["driver": "snapshot-access", "file": "disk", "snapshot-name": "nobody"])
            } catch { unknown = error }
            try await graph.remove(view)
            try await graph.applySnapshot(kept.identifier, of: disk)
            try await graph.deleteSnapshot(kept.identifier, of: disk)
            try await graph.detach(scene.edge)
            try await graph.closeAll()
            return (messages, unknown)
        }
        #expect(messages.count == 2)
        #expect(messages.allSatisfy { $0.hasPrefix("busy") && $0.contains("node 'view'") })
        #expect(unknown?.code == .notFound)
        #expect(unknown?.message.contains("'nobody'") == true)
    }
}
