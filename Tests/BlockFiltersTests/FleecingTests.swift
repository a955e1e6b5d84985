import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

/// A frozen view of a disk in files: active disk, temporary image, filter, snapshot node.
final class FleecingGraph: @unchecked Sendable {
    let graph: BlockGraph
    let folder: TemporaryFolder
    let guest: Edge
    let snapshot: Edge
    let size: Int

    static func withGraph<T: Sendable>(
        size: Int = 1 << 20, options: JSONValue = [:],
        _ body: @escaping @Sendable (FleecingGraph) async throws(BlockError) -> T
    ) async throws -> T {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> T in
            let setup = try await FleecingGraph(thread, folder, size, options)
            let result = try await body(setup)
            for edge in [setup.snapshot, setup.guest]
            where edge.node.parents.contains(where: { $0 === edge }) {
                try await setup.graph.detach(edge)
            }
            try await setup.graph.closeAll()
            return result
        }
    }

    private init(
        _ thread: IOThread, _ folder: TemporaryFolder, _ size: Int, _ options: JSONValue
    ) async throws(BlockError) {
        self.folder = folder
        self.size = size
        graph = BlockGraph(
            on: thread,
            registry: DriverRegistry(
                BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers))
        try await folder.makeFile("disk", size: size, of: 0xaa, on: thread)
        try await folder.makeFile("temp", size: size, on: thread)
        let ends = try await FleecingEnds(in: graph, folder: folder.path, options: options)
        (guest, snapshot) = (ends.guest, ends.snapshot)
    }

    func write(_ offset: Int, _ count: Int, _ value: UInt8) async throws(BlockError) {
        try await guest.fill(ByteRange(offset, count), with: value)
    }

    func read(_ edge: Edge, _ offset: Int, _ count: Int) async throws(BlockError) -> Set<UInt8> {
        Set(try await edge.contents(of: ByteRange(offset, count)))
    }
}

@Suite struct FleecingTests {
    @Test func aGuestWriteLeavesTheSnapshotAlone() async throws {
        let seen = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await setup.write(70_000, 10_000, 0xbb)
            try await setup.guest.writeZeroes(ByteRange(300_000, 5))
            try await setup.guest.discard(ByteRange(1 << 19, 1 << 17))
            return [
                try await setup.read(setup.snapshot, 0, setup.size),
                try await setup.read(setup.guest, 70_000, 10_000),
                try await setup.read(setup.guest, 300_000, 5),
                try await setup.read(setup.guest, 1 << 19, 1 << 17),
            ]
        }
        #expect(seen == [[0xaa], [0xbb], [0], [0]])
    }

    @Test func aDiscardedPartOfTheSnapshotIsRefused() async throws {
        let codes = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await setup.write(0, 65536, 1)
            try await setup.snapshot.discard(ByteRange(0, 65536))
            var codes: [BlockError.Code] = []
            do throws(BlockError) {
                _ = try await setup.read(setup.snapshot, 65535, 1)
            } catch {
                codes.append(error.code)
            }
            #expect(try await setup.read(setup.snapshot, 65536, 65536) == [0xaa])
            // What is not needed any more is not copied any more.
            try await setup.snapshot.discard(ByteRange(131072, 65536))
            try await setup.write(131072, 10, 2)
            return codes
        }
        #expect(codes == [.permissionDenied])
    }

    @Test func statusOfTheSnapshotIsTheFrozenDisks() async throws {
        let runs = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await setup.write(65536, 65536, 1)
            var result: [[Int]] = []
            var offset = 0
            while offset < setup.size {
                let status = try await setup.snapshot.blockStatus(
                    ByteRange(offset, setup.size - offset))
                result.append([status.count, status.flags.contains(.data) ? 1 : 0])
                offset += status.count
            }
            return result
        }
        #expect(runs.map { $0[0] }.reduce(0, +) == 1 << 20)
        #expect(runs.allSatisfy { $0[1] == 1 })
    }

    @Test func aTargetSmallerThanTheDiskIsRefused() async throws {
        await #expect(throws: BlockError.self) {
            try await FleecingGraph.withGraph(options: ["target": "cbw-none"]) {
                _ throws(BlockError) in
            }
        }
    }

    @Test func aDiskTooLargeForItsClustersIsRefused() async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let code = try await thread.run { () async throws(BlockError) -> BlockError.Code in
            let graph = BlockGraph(
                on: thread, registry: DriverRegistry(BlockProtocols.drivers + BlockFilters.drivers))
            for name in ["disk", "temp"] {
                _ = try await graph.open(
                    [
                        "driver": "null-co", "node-name": .string(name),
                        "size": .integer(Limits.nodeSizeMax),
                    ], monitorOwned: true)
            }
            do throws(BlockError) {
                _ = try await graph.open(
                    ["driver": "copy-before-write", "file": "disk", "target": "temp"])
                return .busy
            } catch {
                return error.code
            }
        }
        #expect(code == .exhausted)
    }

    @Test func unknownOptionsNameTheNearestOne() async throws {
        do {
            try await FleecingGraph.withGraph(options: ["on-cbw-eror": "break-snapshot"]) {
                _ throws(BlockError) in
            }
            Issue.record("an unknown option was accepted")
        } catch let error as BlockError {
            #expect(error.remedy?.contains("on-cbw-error") == true)
            #expect(error.node == "cbw")
        }
    }

    @Test(arguments: 1...8) func concurrentWritesAndReadsKeepTheFrozenState(seed: Int) async throws
    {
        let wrong = try await FleecingGraph.withGraph { setup throws(BlockError) in
            final class Tally: @unchecked Sendable {
                var running = 0
                var wrong: [String] = []
            }
            let tally = Tally()
            var state = UInt64(seed) &* 0x9E37_79B9_7F4A_7C15
            func random(_ bound: Int) -> Int {
                state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                return Int(state >> 33) % bound
            }
            for step in 0..<400 {
                let offset = random(setup.size - 1)
                let count = min(1 + random(100_000), setup.size - offset)
                let kind = random(4)
                tally.running += 1
                setup.graph.thread.spawn {
                    do throws(BlockError) {
                        switch kind {
                        case 0: try await setup.write(offset, count, UInt8(step & 0x7f))
                        case 1: try await setup.guest.writeZeroes(ByteRange(offset, count))
                        default:
                            let seen = try await setup.read(setup.snapshot, offset, count)
                            if seen != [0xaa] { tally.wrong.append("\(offset)+\(count): \(seen)") }
                        }
                    } catch {
                        tally.wrong.append("\(error)")
                    }
                    tally.running -= 1
                }
                while tally.running > 16 { await setup.graph.thread.yield() }
            }
            while tally.running > 0 { await setup.graph.thread.sleep(nanoseconds: 100_000) }
            return tally.wrong
        }
        #expect(wrong == [], "seed \(seed)")
    }
}

extension FleecingTests {
    @Test func aSnapshotWhoseUsersLeftIsBroken() async throws {
        let code = try await FleecingGraph.withGraph { setup throws(BlockError) in
            let graph = setup.graph
            guard let cbw = graph.node(named: "cbw"), let snap = graph.node(named: "snap"),
                let disk = graph.node(named: "disk")
            else { return BlockError.Code.notFound }
            // Guest and snapshot leave, the disk is written past the filter, and a reader comes back.
            try await graph.detach(setup.snapshot)
            try await graph.remove(snap)
            let transaction = GraphTransaction(graph)
            try transaction.replace(setup.guest, with: disk)
            try transaction.commit()
            try await setup.write(0, 4096, 1)
            let back = GraphTransaction(graph)
            try back.replace(setup.guest, with: cbw)
            try back.commit()
            let again = try await graph.open(
                ["driver": "snapshot-access", "node-name": "snap", "file": .string(cbw.name)],
                monitorOwned: true)
            let edge = try graph.attach(NamedUser("late"), to: again, .read)
            var result = BlockError.Code.busy
            do throws(BlockError) { _ = try await setup.read(edge, 0, 4096) } catch {
                result = error.code
            }
            try await graph.detach(edge)
            return result
        }
        #expect(code == .permissionDenied)
    }
}
