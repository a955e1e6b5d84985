import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// Frozen views of the dirty clusters of a disk alone.
@Suite struct FleecingBitmapTests {
    /// Replaces the frozen view of `setup` by one of what `ranges` mark.
    static func restricted<T>(
        _ setup: FleecingGraph, granularity: Int = 4096, marking ranges: [ByteRange],
        _ body: (Edge, Edge) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let graph = setup.graph
        try await graph.detach(setup.snapshot)
        try await graph.detach(setup.guest)
        for name in ["snap", "cbw"] { try await graph.remove(try graph.requireNode(named: name)) }
        let disk = try graph.requireNode(named: "disk")
        let bitmap = try await disk.makeDirtyBitmap(named: "b", granularity: granularity)
        for range in ranges { bitmap.mark(range) }
        let filter = try await graph.open(
            [
                "driver": "copy-before-write", "node-name": "cbw", "file": "disk",
                "target": "temp", "bitmap": ["node": "disk", "name": "b"], "discard": "unmap",
            ], monitorOwned: true)
        let view = try await graph.open(
            ["driver": "snapshot-access", "node-name": "snap", "file": "cbw"], monitorOwned: true)
        let guest = try graph.attach(
            NamedUser("guest"), to: filter, Access(uses: [.consistentRead, .write], shares: .all))
        let snapshot = try graph.attach(NamedUser("backup"), to: view, .read)
        let result = try await body(guest, snapshot)
        try await graph.detach(snapshot)
        try await graph.detach(guest)
        return result
    }

    static func read(_ edge: Edge, _ range: ByteRange) async throws(BlockError) -> Set<UInt8> {
        Set(try await edge.contents(of: range))
    }

    static func write(_ edge: Edge, _ range: ByteRange) async throws(BlockError) {
        try await edge.fill(range, with: 0xbb)
    }

    @Test func dirtyClustersKeepTheirOldData() async throws {
        let seen = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await Self.restricted(setup, marking: [ByteRange(70_000, 1)]) {
                guest, snapshot throws(BlockError) in
                try await Self.write(guest, ByteRange(65_536, 4096))
                return try await Self.read(snapshot, ByteRange(65_536, 65_536))
            }
        }
        #expect(seen == [0xaa])
    }

    @Test func cleanClustersDoNotBelongToTheSnapshot() async throws {
        let code = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await Self.restricted(setup, marking: [ByteRange(70_000, 1)]) {
                _, snapshot throws(BlockError) -> BlockError.Code? in
                do throws(BlockError) {
                    _ = try await Self.read(snapshot, ByteRange(131_072, 512))
                    return nil
                } catch { return error.code }
            }
        }
        #expect(code == .permissionDenied)
    }

    @Test func cleanClustersAreNotCopied() async throws {
        let copied = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await Self.restricted(setup, marking: [ByteRange(70_000, 1)]) {
                guest, _ throws(BlockError) in
                try await Self.write(guest, ByteRange(0, 300_000))
                return (guest.node.driver as? CopyBeforeWrite)?.copiedBytes
            }
        }
        #expect(copied == 65_536)
    }

    @Test func aCoarseBitmapTakesAllClustersOfAUnit() async throws {
        let seen = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await Self.restricted(
                setup, granularity: 256 << 10, marking: [ByteRange(300_000, 1)]
            ) { guest, snapshot throws(BlockError) in
                try await Self.write(guest, ByteRange(0, 1 << 20))
                return try await Self.read(snapshot, ByteRange(262_144, 262_144))
            }
        }
        #expect(seen == [0xaa])
    }

    @Test func whatIsMarkedLaterDoesNotBelongToTheSnapshot() async throws {
        let code = try await FleecingGraph.withGraph { setup throws(BlockError) in
            try await Self.restricted(setup, marking: [ByteRange(0, 1)]) {
                guest, snapshot throws(BlockError) -> BlockError.Code? in
                try await Self.write(guest, ByteRange(131_072, 512))
                do throws(BlockError) {
                    _ = try await Self.read(snapshot, ByteRange(131_072, 512))
                    return nil
                } catch { return error.code }
            }
        }
        #expect(code == .permissionDenied)
    }

    @Test(arguments: ["none", "short", "busy"]) func unfitBitmapsAreRefused(name: String)
        async throws
    {
        try await FleecingGraph.withGraph { setup throws(BlockError) in
            let disk = try setup.graph.requireNode(named: "disk")
            try disk.addDirtyBitmap(try DirtyBitmap(name: "short", granularity: 512, size: 512))
            try await disk.makeDirtyBitmap(named: "busy").hold(for: "a test")
            let nodes = setup.graph.nodes.count
            do throws(BlockError) {
                _ = try await setup.graph.open([
                    "driver": "copy-before-write", "file": "disk", "target": "temp",
                    "bitmap": ["node": "disk", "name": .string(name)],
                ])
                Issue.record("the bitmap was taken")
            } catch {
                #expect(error.message.contains("'\(name)'"))
            }
            #expect(setup.graph.nodes.count == nodes)
        }
    }
}
