import BlockCore
import BlockGraph
import QMP
import Testing

@testable import BlockFormats

#if canImport(Glibc)
import Glibc
#endif

/// What a repair believes where two claims contradict each other: the disk that can be read is never given
/// up for what is said about it elsewhere.
@Suite struct QCOW2RepairTrustTests {
    static let copied: UInt64 = 1 << 63

    /// An image with a snapshot and a bitmap, damaged. Guest clusters 0 to 3 have data, 0 and 1 of their
    /// own.
    private static func image(
        _ damage: (inout QCOW2Bytes) -> Void
    ) throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"])
        try folder.run(["qemu-io", "-c", "write -P 1 0 256k", "a.qcow2"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        try folder.run(["qemu-io", "-c", "write -P 2 0 64k", "a.qcow2"])
        try folder.run(["qemu-img", "bitmap", "--add", "a.qcow2", "b"])
        try folder.run(["qemu-io", "-c", "write -P 3 64k 64k", "a.qcow2"])
        try Self.damage(folder, damage)
        return folder
    }

    private static func damage(
        _ folder: QCOW2TestFolder, _ damage: (inout QCOW2Bytes) -> Void
    ) throws {
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        damage(&bytes)
        try folder.write(bytes.bytes, "a.qcow2")
    }

    /// Repairs the image: it is clean, for QEMU too, or said not to be.
    private static func mend(
        _ folder: QCOW2TestFolder, _ story: String
    ) async throws -> CheckReport {
        _ = try await folder.mendOrCheck("a.qcow2", .all)
        let report = try await folder.mendOrCheck("a.qcow2")
        if report.isClean {
            #expect(throws: Never.self, "\(story)") { try folder.check("a.qcow2") }
        }
        return report
    }

    // MARK: Single fields

    struct Field: Sendable, CustomTestStringConvertible {
        var name: String
        var byteCount: Int
        var place: @Sendable (QCOW2Bytes) -> Int
        var testDescription: String { name }
    }

    private static func extensionPlace(_ bytes: QCOW2Bytes, _ type: UInt64) -> Int {
        var place = 112
        while bytes.number(place) >> 32 != type, bytes.number(place) >> 32 != 0 {
            place += 8 + (Int(bytes.number(place) & 0xffff_ffff) + 7) & ~7
        }
        return place
    }

    private static let fields: [Field] = [
        Field(name: "entries of the L1 table", byteCount: 4) { _ in 36 },
        Field(name: "refcount table", byteCount: 8) { _ in 48 },
        Field(name: "clusters of the refcount table", byteCount: 4) { _ in 56 },
        Field(name: "number of snapshots", byteCount: 4) { _ in 60 },
        Field(name: "snapshot table", byteCount: 8) { _ in 64 },
        Field(name: "autoclear features", byteCount: 8) { _ in 88 },
        Field(name: "width of refcounts", byteCount: 4) { _ in 96 },
        Field(name: "first entry of the refcount table", byteCount: 8) { $0.offset(48) },
        Field(name: "unused entry of the refcount table", byteCount: 8) { $0.offset(48) + 32 },
        Field(name: "L1 table of the snapshot", byteCount: 8) { $0.offset(64) },
        Field(name: "entries of the snapshot's L1 table", byteCount: 4) { $0.offset(64) + 8 },
        Field(name: "the snapshot's L1 entry", byteCount: 8) { $0.offset($0.offset(64)) },
        Field(name: "entry of the snapshot's L2 table", byteCount: 8) {
            $0.offset($0.offset($0.offset(64)))
        },
        Field(name: "number of bitmaps", byteCount: 4) { extensionPlace($0, 0x2385_2875) + 8 },
        Field(name: "directory of the bitmaps", byteCount: 8) {
            extensionPlace($0, 0x2385_2875) + 24
        },
        Field(name: "table of the bitmap", byteCount: 8) { $0.bitmapDirectory ?? 0 },
        Field(name: "length of the end marker", byteCount: 4) { extensionPlace($0, 0) + 4 },
    ]

    private static let values: [UInt64] =
        [0, 2, 16, 0x8000, 0xffff_ffff, 1 << 56, .max, 0x8000_0000_0004_0000]
        + (1...9).map { $0 << 16 }

    @Test(arguments: fields) func aFieldThatLiesCostsNoData(field: Field) async throws {
        let folder = try Self.image { _ in }
        let good = try folder.bytes("a.qcow2")
        let contents = try await folder.contents("a.qcow2")
        let place = field.place(QCOW2Bytes(bytes: good))
        for value in Self.values where field.byteCount == 8 || value <= 0xffff_ffff {
            var bytes = QCOW2Bytes(bytes: good)
            if field.byteCount == 8 {
                bytes.set(place, value)
            } else {
                let rest = bytes.number(place) & 0xffff_ffff
                bytes.set(place, value << 32 | rest)
            }
            try folder.write(bytes.bytes, "a.qcow2")
            let story = "\(field.name): \(value)"
            // What nobody can open, nobody has repaired.
            guard (try? await folder.mendOrCheck("a.qcow2", .all)) != nil else {
                #expect(try folder.bytes("a.qcow2") == bytes.bytes, "\(story)")
                continue
            }
            #expect(try await folder.contents("a.qcow2") == contents, "\(story)")
            _ = try await Self.mend(folder, story)
        }
    }

    // MARK: Several fields

    private static let seeds: Range<Int> = {
        let text = getenv("MERINO_SIMULATION_SEEDS").map { String(cString: $0) }
        return 0..<(text.flatMap { Int($0) } ?? 40)
    }()

    /// Reads what can be read, a cluster of 4 KiB at a time; `nil` for those that cannot be.
    private static func readable(_ folder: QCOW2TestFolder) async throws -> [[UInt8]?] {
        try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            var result: [[UInt8]?] = []
            for offset in stride(from: 0, to: edge.size, by: 4096) {
                let vector = try IOVector(allocating: 4096)
                let isRead = (try? await edge.read(offset, into: vector)) != nil
                result.append(isRead ? vector.array : nil)
            }
            return result
        }
    }

    /// Where tables are, and how many of their entries are worth a change.
    private static func tables(of bytes: QCOW2Bytes) -> [(offset: Int, count: Int)] {
        let snapshot = bytes.offset(64)
        let snapshotL1 = bytes.offset(snapshot)
        return [
            (bytes.l1, 1), (bytes.l2, 100), (bytes.offset(48), 3), (snapshot, 1), (snapshotL1, 1),
            (bytes.offset(snapshotL1), 100), (bytes.bitmapDirectory ?? 0, 1),
        ]
    }

    /// Makes one entry of one of `tables` name another place.
    private static func redirect(
        _ bytes: inout QCOW2Bytes, _ tables: [(offset: Int, count: Int)],
        _ random: inout QCOW2TestRandom
    ) -> String {
        let table = tables[random.next(below: tables.count)]
        let place = table.offset + 8 * random.next(below: table.count)
        let cluster = random.next(below: bytes.bytes.count / 4096 + 1)
        let flags: UInt64 = [0, copied, copied, copied | 1 << 57, 1][random.next(below: 5)]
        bytes.set(place, UInt64(cluster) << 12 | flags)
        return "\(place) names cluster \(cluster), flags \(flags >> 56)"
    }

    @Test(arguments: seeds) func whatCouldBeReadStaysAsItIs(seed: Int) async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "a.qcow2", "1M",
        ])
        try folder.run(["qemu-io", "-c", "write -P 1 0 200k", "a.qcow2"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        try folder.run(["qemu-io", "-c", "write -P 2 100k 200k", "a.qcow2"])
        try folder.run(["qemu-img", "bitmap", "--add", "-g", "512", "a.qcow2", "b"])
        try folder.run(["qemu-io", "-c", "write -P 3 150k 10k", "a.qcow2"])
        let good = try await Self.readable(folder)
        var random = QCOW2TestRandom(seed: seed)
        var story = "seed \(seed)"
        try Self.damage(folder) { bytes in
            let tables = Self.tables(of: bytes)
            for _ in 0..<(1 + random.next(below: 3)) {
                story += ", " + Self.redirect(&bytes, tables, &random)
            }
        }
        guard let before = try? await Self.readable(folder) else { return }
        guard try await Self.mend(folder, story).isClean else {
            Issue.record("not clean: \(story)")
            return
        }
        let after = try await Self.readable(folder)
        let lost = good.indices.filter { good[$0] == before[$0] && after[$0] != before[$0] }
        #expect(lost == [], "\(story)")
    }

    // MARK: Live data

    @Test func aSnapshotThatNamesLiveDataAsATableLeavesItAlone() async throws {
        let folder = try Self.image { bytes in
            let live = UInt64(bytes.offset(bytes.entry(0)))
            bytes.set(bytes.offset(bytes.offset(64)), live)
        }
        let contents = try await folder.contents("a.qcow2")
        #expect(try await Self.mend(folder, "").isClean)
        #expect(try await folder.contents("a.qcow2") == contents)
    }

    @Test func repairingLeaksWritesNoCountsIntoLiveData() async throws {
        let folder = try Self.image { bytes in
            bytes.set(bytes.offset(48), UInt64(bytes.offset(bytes.entry(0))))
        }
        let before = try folder.bytes("a.qcow2")
        let report = try await folder.mendOrCheck("a.qcow2", .leaks)
        #expect(report.corruptions > 0)
        #expect(try folder.bytes("a.qcow2") == before)
    }

    @Test func stateOfAMachineBeyondTheDiskStays() async throws {
        // Room for 64 Ki entries, all of it the table's own.
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a.qcow2", "4M",
        ])
        try folder.run(["qemu-io", "-c", "write -P 5 3M 1M", "a.qcow2"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        // A disk that says it is smaller: what is beyond is there as state would be.
        try Self.damage(folder) { $0.set(24, 1 << 20) }
        let entries = try QCOW2Bytes(bytes: folder.bytes("a.qcow2")).number(36) >> 32
        try Self.damage(folder) { $0.set($0.l1 + 3 * 8 * 32, 1 << 57) }
        #expect(try await Self.mend(folder, "").isClean)
        #expect(try QCOW2Bytes(bytes: folder.bytes("a.qcow2")).number(36) >> 32 == entries)
    }

    // MARK: Opening

    @Test func openingADirtyImageMendsCountsAndKeepsTheDisk() async throws {
        let folder = try Self.image { bytes in
            // The refcount table is said to reach over all there is.
            bytes.set(56, 16 << 32 | bytes.number(56) & 0xffff_ffff)
            bytes.set(72, 1)
        }
        let contents = try await folder.contents("a.qcow2")
        try await folder.open("a.qcow2") { _ throws(BlockError) in }
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2") == contents)
    }

    @Test(arguments: [(UInt64(1) << 40, "past the end"), (0x200, "no cluster")])
    func openingADirtyImageDropsNoEntry(entry: UInt64, what: String) async throws {
        let folder = try Self.image { bytes in
            bytes.set(bytes.entry(9), entry | Self.copied)
            bytes.set(72, 1)
        }
        let before = try folder.bytes("a.qcow2")
        let error = await #expect(throws: BlockError.self, "\(what)") {
            try await folder.open("a.qcow2") { _ throws(BlockError) in }
        }
        #expect(error?.code == .corrupt)
        #expect(try folder.bytes("a.qcow2") == before)
    }

    @Test func aDirtyImageThatTheKeyDoesNotOpenStaysAsItIs() async throws {
        let folder = try Self.encrypted()
        try Self.damage(folder) { bytes in
            bytes.set(72, 1)
            bytes.setCount(4, 0)
        }
        let before = try folder.bytes("a.qcow2")
        await #expect(throws: BlockError.self) {
            try await folder.open("a.qcow2", options: ["encrypt": ["key-secret": "other"]]) {
                _ throws(BlockError) in
            }
        }
        #expect(try folder.bytes("a.qcow2") == before)
    }

    // MARK: Keys

    private static func encrypted() throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.runWithKeys(
            ["qemu-img", "create", "-q", "-f", "qcow2"] + QCOW2TestFolder.objects + [
                "-o", "encrypt.format=luks,encrypt.key-secret=good,encrypt.iter-time=10",
                "a.qcow2", "8M",
            ])
        return folder
    }

    /// What the bits of the pointer's offset may become, and its length.
    @Test(arguments: [(8, UInt64(0x7f) << 56), (8, 1 << 16), (16, 1 << 20), (0, 1 << 32)])
    func clustersOfLostKeysAreNotGivenBack(place: Int, bits: UInt64) async throws {
        let folder = try Self.encrypted()
        try Self.damage(folder) { bytes in
            let at = Self.extensionPlace(bytes, 0x0537_be77) + place
            bytes.set(at, bytes.number(at) ^ bits)
            bytes.setCount(12, 7)
        }
        let before = try folder.bytes("a.qcow2")
        for repair in [CheckRepair.leaks, .all] {
            let report = try await folder.mendOrCheck("a.qcow2", repair)
            #expect(report.corruptions > 0 && report.leaksFixed == 0)
            #expect(try folder.bytes("a.qcow2") == before)
        }
    }

    // MARK: Extensions

    @Test func anEndMarkerWithALengthIsMended() async throws {
        let folder = try Self.image { bytes in
            bytes.set(Self.extensionPlace(bytes, 0), 0xffff_ffff)
        }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions == 1)
        #expect(try await Self.mend(folder, "").isClean)
        try folder.check("a.qcow2")
    }

    @Test func aDataFileWithoutANameIsReported() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=a.data", "a.qcow2", "1M",
        ])
        try Self.damage(folder) { bytes in
            let place = Self.extensionPlace(bytes, 0x4441_5441)
            bytes.set(place, bytes.number(place) ^ 1 << 32)
        }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions == 1)
        #expect(try await folder.mendOrCheck("a.qcow2", .all).corruptions == 1)
    }

    // MARK: Snapshots

    enum Part: CaseIterable, Sendable { case l1Table, l2Table, data }

    @Test(arguments: Part.allCases, ["cached", "none"])
    func aSnapshotIsNotPutOverWhatTheDiskNeedsAndHasNoCount(
        part: Part, overlapCheck: String
    ) async throws {
        let folder = try Self.image { bytes in
            let place =
                switch part {
                case .l1Table: bytes.l1
                case .l2Table: bytes.l2
                case .data: bytes.offset(bytes.entry(0))
                }
            bytes.setCount(place >> 16, 0)
        }
        let contents = try await folder.contents("a.qcow2")
        let error = await #expect(throws: BlockError.self) {
            try await folder.open("a.qcow2", options: ["overlap-check": .string(overlapCheck)]) {
                edge throws(BlockError) in
                try await QCOW2SnapshotTests.create(edge, "t")
            }
        }
        #expect(error?.code == .corrupt)
        #expect(try await folder.contents("a.qcow2") == contents)
    }
}
