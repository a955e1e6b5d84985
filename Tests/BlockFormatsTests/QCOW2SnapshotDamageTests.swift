import BlockCore
import BlockGraph
import Testing

@testable import BlockFormats

/// Snapshots with L1 tables of unusual size and place: empty ones, and those of damaged images.
@Suite struct QCOW2SnapshotDamageTests {
    // MARK: Empty L1 tables

    /// What is done with an empty disk and its snapshot `s`, both made by the peer.
    enum Use: String, CaseIterable, Sendable {
        case delete, apply, createAnother, growThenDelete, growThenApply
    }

    @Test(arguments: Use.allCases) func anEmptyL1TableHasNoClusters(use: Use) async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "0"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        let header = try QCOW2HeaderTests.parse(try folder.bytes("a.qcow2"))
        try #require(header.l1EntryCount == 0)
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            switch use {
            case .delete: try await QCOW2SnapshotTests.delete(edge, "s")
            case .apply: try await QCOW2SnapshotTests.apply(edge, "s")
            case .createAnother: try await QCOW2SnapshotTests.create(edge, "t")
            case .growThenDelete, .growThenApply:
                try await edge.resize(to: 1 << 20)
                try await QCOW2SnapshotTests.fill(edge, 0..<1 << 20, 5)
                if use == .growThenApply {
                    try await QCOW2SnapshotTests.apply(edge, "s")
                } else {
                    try await QCOW2SnapshotTests.delete(edge, "s")
                }
            }
        }
        try folder.check("a.qcow2")
        let expected = [UInt8](repeating: 5, count: use == .growThenDelete ? 1 << 20 : 0)
        #expect(try await folder.contents("a.qcow2") == expected)
        // What is left can be used, and no cluster that is in use counts as free.
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            for snapshot in try edge.node.requireSnapshotStore().internalSnapshots {
                try await QCOW2SnapshotTests.delete(edge, snapshot.name)
            }
            try await edge.resize(to: 2 << 20)
            try await QCOW2SnapshotTests.fill(edge, 0..<2 << 20, 6)
        }
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2") == [UInt8](repeating: 6, count: 2 << 20))
    }

    // MARK: Damage

    /// An image of 1 MiB with clusters of 512 bytes, whose snapshot table has these entries.
    static func image(
        _ folder: QCOW2TestFolder, _ snapshots: [QCOW2.Snapshot]
    ) async throws {
        try await folder.create("a.qcow2", ["size": .integer(1 << 20), "cluster-size": 512])
        var bytes = try folder.bytes("a.qcow2")
        bytes += [UInt8](repeating: 0, count: -bytes.count & 511)
        let place = bytes.count
        bytes += try QCOW2.Snapshot.serialiseTable(snapshots)
        bytes += [UInt8](repeating: 0, count: -bytes.count & 511)
        bytes.withUnsafeMutableBytes {
            $0.storeBigEndian(UInt32(snapshots.count), at: 60)
            $0.storeBigEndian(UInt64(place), at: 64)
        }
        try folder.write(bytes, "a.qcow2")
    }

    static func snapshot(_ number: Int, l1Offset: Int, l1EntryCount: Int) -> QCOW2.Snapshot {
        var snapshot = QCOW2.Snapshot()
        snapshot.identifier = Array("\(number)".utf8)
        snapshot.name = Array("s\(number)".utf8)
        snapshot.l1Offset = l1Offset
        snapshot.l1EntryCount = l1EntryCount
        snapshot.stateDiskSize(1 << 20)
        return snapshot
    }

    /// The error of `body`, if there is one.
    static func failure(
        _ body: () async throws(BlockError) -> Void
    ) async -> BlockError? {
        do throws(BlockError) {
            try await body()
            return nil
        } catch { return error }
    }

    @Test(arguments: ["cached", "all"])
    func tablesPastTheEndOfTheFileAreRefusedByName(overlapCheck: String) async throws {
        let folder = try QCOW2TestFolder()
        let entries = QCOW2.Limit.l1TableBytesMax / 8
        try await Self.image(
            folder,
            (0..<4000).map {
                Self.snapshot($0, l1Offset: ($0 + 1) << 26, l1EntryCount: entries)
            })
        let error = await #expect(throws: BlockError.self) {
            try await folder.open("a.qcow2", options: ["overlap-check": .string(overlapCheck)]) {
                _ throws(BlockError) in
            }
        }
        #expect(error?.code == .corrupt)
        #expect(error?.message.contains("snapshot 's0'") == true)
        #expect(error?.message.contains("past the end of the file") == true)
    }

    @Test func aTableOverTheHeaderIsRefusedByName() async throws {
        let folder = try QCOW2TestFolder()
        try await Self.image(folder, [Self.snapshot(7, l1Offset: 0, l1EntryCount: 1)])
        let error = await #expect(throws: BlockError.self) {
            try await folder.open("a.qcow2") { _ throws(BlockError) in }
        }
        #expect(error?.code == .corrupt)
        #expect(error?.message.contains("snapshot 's7'") == true)
    }

    @Test func withTablesPastTheEndAnImageOpensForReading() async throws {
        let folder = try QCOW2TestFolder()
        try await Self.image(folder, [Self.snapshot(1, l1Offset: 1 << 40, l1EntryCount: 32)])
        let (names, zeroCount, error) = try await folder.open("a.qcow2", writable: false) {
            edge throws(BlockError) in
            let names = try edge.node.requireSnapshotStore().internalSnapshots.map(\.name)
            let disk = try await QCOW2SnapshotTests.everything(edge)
            let error = await Self.failure { () throws(BlockError) in
                _ = try await QCOW2SnapshotTests.contents(edge, ofSnapshot: "s1")
            }
            return (names, disk.filter { $0 == 0 }.count, error)
        }
        #expect(names == ["s1"])
        #expect(zeroCount == 1 << 20)
        #expect(error?.code == .corrupt)
        #expect(error?.message.contains("past the end of the file") == true)
    }

    /// The size of a disk that a snapshot may state, and that its clusters can map no more.
    static let sizes = [
        QCOW2.Geometry(clusterBits: 9, refcountOrder: 4).sizeMax + 512, 1 << 60,
        Limits.nodeSizeMax,
    ]

    @Test(arguments: sizes) func aDiskThatIsTooLargeIsNeitherAppliedNorRead(size: Int) async throws
    {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(1 << 20), "cluster-size": 512])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 0..<100_000, 1)
            try await QCOW2SnapshotTests.create(edge, "s")
            try await QCOW2SnapshotTests.fill(edge, 0..<100_000, 2)
        }
        var bytes = try folder.bytes("a.qcow2")
        let header = try QCOW2HeaderTests.parse(bytes)
        bytes.withUnsafeMutableBytes {
            $0.storeBigEndian(UInt64(size), at: header.snapshotsOffset + 48)
        }
        try folder.write(bytes, "a.qcow2")
        let errors = try await folder.open("a.qcow2") { edge throws(BlockError) in
            [
                await Self.failure { () throws(BlockError) in
                    try await QCOW2SnapshotTests.apply(edge, "s")
                },
                await Self.failure { () throws(BlockError) in
                    let store = try edge.node.requireSnapshotStore()
                    let identifier = try QCOW2SnapshotTests.identifier(edge, "s")
                    try await store.openSnapshot(identifier, for: edge.node).close()
                },
            ].map { $0?.code }
        }
        #expect(errors == [.corrupt, .corrupt])
        // Nothing has changed, the dirty bit neither.
        #expect(try folder.bytes("a.qcow2") == bytes)
    }
}
