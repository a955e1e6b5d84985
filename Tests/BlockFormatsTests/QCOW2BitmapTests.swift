import BlockCore
import BlockGraph
import Foundation
import QMP
import Testing

@testable import BlockFormats

/// Dirty bitmaps that images keep, beside QEMU's tools.
@Suite struct QCOW2BitmapTests {
    static let size = 8 << 20

    static func write(_ edge: Edge, _ offset: Int, _ count: Int) async throws(BlockError) {
        let data = try IOVector(allocating: count)
        data.fill(0x5a)
        try await edge.write(offset, from: data)
    }

    /// A bitmap as a test compares it.
    struct State: Equatable, Sendable {
        var name: String
        var granularity: Int
        var isEnabled = true
        var isInconsistent = false
        var ranges: [ByteRange] = []
    }

    static func states(_ node: BlockNode) async -> [State] {
        for bitmap in node.dirtyBitmaps { await bitmap.load() }
        return node.dirtyBitmaps.map { bitmap in
            var state = State(
                name: bitmap.name, granularity: bitmap.granularity, isEnabled: bitmap.isEnabled,
                isInconsistent: bitmap.isInconsistent)
            bitmap.forEachDirtyRange { state.ranges.append($0) }
            return state
        }
    }

    static func states(_ folder: QCOW2TestFolder, _ name: String) async throws -> [State] {
        try await folder.open(name, writable: false) { edge throws(BlockError) in
            await states(edge.node)
        }
    }

    /// What QEMU finds dirty in a bitmap of an image.
    static func rangesByQEMU(
        _ folder: QCOW2TestFolder, _ name: String, _ bitmap: String
    ) throws -> [ByteRange] {
        let text = try folder.run([
            "nbdinfo", "--json", "--map=qemu:dirty-bitmap:\(bitmap)", "--", "[", "qemu-nbd", "-r",
            "-f",
            "qcow2", "-B", bitmap, folder[name], "]",
        ])
        guard case .array(let extents) = try JSONParser.parse(text) else { return [] }
        var result: [ByteRange] = []
        for extent in extents where extent["type"] == 1 {
            guard case .integer(let offset)? = extent["offset"],
                case .integer(let count)? = extent["length"]
            else { continue }
            if let last = result.last, last.end == offset {
                result[result.count - 1] = ByteRange(last.offset, last.count + count)
            } else {
                result.append(ByteRange(offset, count))
            }
        }
        return result
    }

    /// The flags of each bitmap by its name, as `qemu-img info` tells them.
    ///
    /// - Parameter sharing: the image is open elsewhere.
    static func flagsByQEMU(
        _ folder: QCOW2TestFolder, _ name: String, sharing: Bool = false
    ) throws -> [String: [String]] {
        let text = try folder.run(
            ["qemu-img", "info", "--output=json"] + (sharing ? ["-U"] : []) + [name])
        let data = try JSONParser.parse(text)["format-specific"]?["data"]
        guard case .array(let list)? = data?["bitmaps"] else { return [:] }
        var result: [String: [String]] = [:]
        for bitmap in list {
            guard case .string(let name)? = bitmap["name"],
                case .array(let flags)? = bitmap["flags"]
            else { continue }
            result[name] = flags.map { if case .string(let flag) = $0 { flag } else { "?" } }
        }
        return result
    }

    /// An image with bitmap `b` in which QEMU recorded a write of `[1 MiB, 1 MiB + 64 KiB)`.
    static func folderWithBitmap(_ options: String...) throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.run(
            ["qemu-img", "create", "-f", "qcow2"] + options + ["a.qcow2", String(size)])
        try folder.run(["qemu-img", "bitmap", "--add", "-g", "64k", "a.qcow2", "b"])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "a.qcow2"])
        return folder
    }

    static let recorded = State(
        name: "b", granularity: 65_536, ranges: [ByteRange(1 << 20, 65_536)])

    // MARK: Both ways

    @Test func bitmapsOfQEMUsAreLoaded() async throws {
        let folder = try Self.folderWithBitmap()
        try folder.run(["qemu-img", "bitmap", "--add", "-g", "512", "a.qcow2", "fine"])
        try folder.run(["qemu-img", "bitmap", "--add", "--disable", "a.qcow2", "off"])
        try folder.run([
            "qemu-io", "-f", "qcow2", "-c", "write 5000 10", "-c", "write -z 3M 1M", "a.qcow2",
        ])
        let states = try await Self.states(folder, "a.qcow2")
        let zeroed = ByteRange(3 << 20, 1 << 20)
        #expect(
            states == [
                State(
                    name: "b", granularity: 65_536,
                    ranges: [ByteRange(0, 65_536), ByteRange(1 << 20, 65_536), zeroed]),
                State(name: "fine", granularity: 512, ranges: [ByteRange(4608, 512), zeroed]),
                State(name: "off", granularity: 65_536, isEnabled: false),
            ])
    }

    static let variants = [
        (512, 512), (512, 65_536), (4096, 512), (65_536, 512), (65_536, 4096), (2 << 20, 512),
        (65_536, 1 << 31),
    ]

    @Test(arguments: variants) func bitmapsComeBackAndQEMUReadsThem(
        clusterSize: Int, granularity: Int
    ) async throws {
        for seed in 1...3 {
            let folder = try QCOW2TestFolder()
            try await folder.create(
                "a.qcow2",
                ["size": .integer(Self.size - 1536), "cluster-size": .integer(clusterSize)])
            let expected = try await folder.open("a.qcow2") { edge throws(BlockError) in
                var random = QCOW2TestRandom(seed: seed)
                let node = edge.node
                try await node.makeDirtyBitmap(
                    named: "b", granularity: granularity, persistent: true)
                try await node.makeDirtyBitmap(
                    named: "off", granularity: 4096, persistent: true, enabled: false)
                try await node.makeDirtyBitmap(named: "gone", granularity: 4096)
                // Clusters of bits that are all set, too.
                if seed > 1 { try await edge.writeZeroes(ByteRange(0, 5 << 20)) }
                for _ in 0..<30 {
                    let offset = random.next(below: node.size - 70_000)
                    try await Self.write(edge, offset, 1 + random.next(below: 70_000))
                }
                return await Self.states(node).filter { $0.name != "gone" }
            }
            try folder.check("a.qcow2")
            let found = try await Self.states(folder, "a.qcow2")
            #expect(found == expected, "seed \(seed)")
            #expect(try Self.flagsByQEMU(folder, "a.qcow2") == ["b": ["auto"], "off": []])
            for state in expected {
                let ranges = try Self.rangesByQEMU(folder, "a.qcow2", state.name)
                #expect(ranges == state.ranges, "seed \(seed), \(state.name)")
            }
        }
    }

    @Test func qemuGoesOnWithABitmapAndMerinoWithThat() async throws {
        let folder = try Self.folderWithBitmap()
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.write(edge, 3 << 20, 1)
        }
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write 5M 1", "a.qcow2"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.write(edge, 7 << 20, 1)
        }
        try folder.check("a.qcow2")
        let states = try await Self.states(folder, "a.qcow2")
        #expect(
            states.first?.ranges.map(\.offset) == [1 << 20, 3 << 20, 5 << 20, 7 << 20])
    }

    @Test func informationListsThemAsQEMUDoes() async throws {
        let folder = try Self.folderWithBitmap()
        try folder.run(["qemu-img", "bitmap", "--add", "--disable", "-g", "4k", "a.qcow2", "off"])
        let text = try folder.run(["qemu-img", "info", "--output=json", "a.qcow2"])
        let expected = try JSONParser.parse(text)["format-specific"]
        let found = try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            try await edge.node.driver.information.formatSpecific
        }
        #expect(found?.text() == expected?.text())
    }

    // MARK: In use

    @Test func anImageIsMarkedBeforeItsFirstChange() async throws {
        let folder = try Self.folderWithBitmap()
        let path = folder.path
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            Self.copy(path, "before.qcow2")
            // Reading and flushing change nothing.
            try await edge.read(0, into: try IOVector(allocating: 4096))
            try await edge.flush()
            Self.copy(path, "read.qcow2")
            try await Self.write(edge, 0, 512)
            Self.copy(path, "written.qcow2")
        }
        for name in ["before.qcow2", "read.qcow2"] {
            #expect(try Self.flagsByQEMU(folder, name) == ["b": ["auto"]])
            #expect(try await Self.states(folder, name) == [Self.recorded])
        }
        #expect(try Self.flagsByQEMU(folder, "written.qcow2") == ["b": ["in-use", "auto"]])
        let crashed = try await Self.states(folder, "written.qcow2")
        #expect(crashed.map(\.isInconsistent) == [true])
        #expect(try Self.flagsByQEMU(folder, "a.qcow2") == ["b": ["auto"]])
        let closed = try await Self.states(folder, "a.qcow2")
        #expect(closed.first?.ranges.count == 2)
    }

    /// Copies the image as a crash would leave it.
    static func copy(_ path: String, _ name: String) {
        try? FileManager.default.copyItem(atPath: "\(path)/a.qcow2", toPath: "\(path)/\(name)")
    }

    @Test(arguments: ["now", "zero", "discard", "resize"]) func everyKindOfChangeMarksTheImage(
        kind: String
    ) async throws {
        let folder = try Self.folderWithBitmap()
        let path = folder.path
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            switch kind {
            case "now":
                let data = try IOVector(allocating: 4096)
                #expect(!edge.writeNow(1 << 20, from: data), "before it is marked")
                try await edge.write(1 << 20, from: data)
            case "zero": try await edge.writeZeroes(ByteRange(0, 65_536))
            case "discard": try await edge.discard(ByteRange(1 << 20, 65_536))
            default: try await edge.resize(to: Self.size * 2)
            }
            Self.copy(path, "changed.qcow2")
        }
        #expect(try Self.flagsByQEMU(folder, "changed.qcow2") == ["b": ["in-use", "auto"]])
        try folder.check("a.qcow2")
    }

    @Test func anImageThatWasNotChangedIsNotWritten() async throws {
        let folder = try Self.folderWithBitmap()
        let before = try folder.bytes("a.qcow2")
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await edge.read(0, into: try IOVector(allocating: 4096))
        }
        #expect(try folder.bytes("a.qcow2") == before)
    }

    @Test func anInconsistentBitmapStaysUntilItIsRemoved() async throws {
        let folder = try Self.folderWithBitmap()
        let path = folder.path
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.write(edge, 0, 512)
            Self.copy(path, "c.qcow2")
        }
        try await folder.open("c.qcow2") { edge throws(BlockError) in
            try await Self.write(edge, 0, 512)
        }
        #expect(try Self.flagsByQEMU(folder, "c.qcow2") == ["b": ["in-use", "auto"]])
        try await folder.open("c.qcow2") { edge throws(BlockError) in
            let bitmap = try edge.node.requireDirtyBitmap(named: "b")
            try await edge.node.discardDirtyBitmap(bitmap)
        }
        try folder.check("c.qcow2")
        #expect(try Self.flagsByQEMU(folder, "c.qcow2") == [:])
    }

    // MARK: Removal, sizes

    @Test func removalIsDurableAndGivesTheSpaceBack() async throws {
        let folder = try Self.folderWithBitmap()
        try folder.run(["qemu-img", "bitmap", "--add", "a.qcow2", "c"])
        let path = folder.path
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            for name in ["b", "c"] {
                let bitmap = try edge.node.requireDirtyBitmap(named: name)
                try await edge.node.discardDirtyBitmap(bitmap)
                Self.copy(path, "after-\(name).qcow2")
            }
        }
        #expect(try Self.flagsByQEMU(folder, "after-b.qcow2") == ["c": ["auto"]])
        #expect(try Self.flagsByQEMU(folder, "after-c.qcow2") == [:])
        try folder.check("a.qcow2")
    }

    @Test(arguments: [3 << 20, 16 << 20]) func bitmapsFollowTheImagesSize(size: Int) async throws {
        let folder = try Self.folderWithBitmap()
        let expected = try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await edge.resize(to: size)
            return await Self.states(edge.node)
        }
        try folder.check("a.qcow2")
        #expect(try await Self.states(folder, "a.qcow2") == expected)
        #expect(try Self.rangesByQEMU(folder, "a.qcow2", "b") == expected.first?.ranges)
    }

    @Test func countingAnewKeepsTheBitmaps() async throws {
        let folder = try Self.folderWithBitmap("-o", "lazy_refcounts=on")
        var bytes = try folder.bytes("a.qcow2")
        bytes[79] |= 1
        try folder.write(bytes, "a.qcow2")
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.write(edge, 0, 4 << 20)
        }
        try folder.check("a.qcow2")
        let states = try await Self.states(folder, "a.qcow2")
        #expect(states.first?.ranges == [ByteRange(0, 4 << 20)])
    }

    @Test func versionTwoKeepsNoBitmaps() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": 65_536, "version": "v2"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            do throws(BlockError) {
                try await edge.node.makeDirtyBitmap(named: "b", persistent: true)
                Issue.record("it was taken")
            } catch { #expect(error.code == .unsupported) }
        }
    }

    // MARK: Damage

    /// The image's bytes, up to the end of its last cluster.
    static func wholeClusters(_ folder: QCOW2TestFolder) throws -> [UInt8] {
        let bytes = try folder.bytes("a.qcow2")
        return bytes + [UInt8](repeating: 0, count: -bytes.count & 65_535)
    }

    static func header(_ bytes: [UInt8]) throws -> QCOW2.Header {
        try bytes.withUnsafeBytes { memory in
            try QCOW2.Header(
                parsing: UnsafeRawBufferPointer(rebasing: memory[..<65_536]),
                fileSize: memory.count)
        }
    }

    /// Where the data of the bitmaps extension, and the directory, begin.
    static func places(_ bytes: [UInt8]) throws -> (data: Int, directory: Int) {
        let header = try header(bytes)
        let found = try #require(
            header.extensions.first { $0.type == QCOW2.HeaderExtension.bitmaps })
        let place = try QCOW2.BitmapsExtension(parsing: found.data, clusterSize: 65_536)
        let magic: [UInt8] = [0x23, 0x85, 0x28, 0x75]
        let start = try #require((0..<4096).first { Array(bytes[$0..<$0 + 4]) == magic })
        return (start + 8, place.directoryOffset)
    }

    /// Bytes to change: in the header's extension, or in the directory.
    enum Damage: Sendable, CaseIterable {
        case count, countZero, reserved, directoryTooLong, directoryEmpty, directoryUnaligned,
            directoryFarAway, tableUnaligned, tableZero, tableTooLong, flags, granularity,
            granularityLow, nameEmpty, nameTooLong, extraTooLong

        func apply(_ bytes: inout [UInt8], _ data: Int, _ directory: Int) {
            switch self {
            case .count: bytes[data + 3] = 2
            case .countZero: bytes[data + 3] = 0
            case .reserved: bytes[data + 7] = 1
            case .directoryTooLong: bytes[data + 8] = 1
            case .directoryEmpty: for index in 8..<16 { bytes[data + index] = 0 }
            case .directoryUnaligned: bytes[data + 23] = 1
            case .directoryFarAway: bytes[data + 17] = 0x7f
            case .tableUnaligned: bytes[directory + 6] = 1
            case .tableZero: for index in 0..<8 { bytes[directory + index] = 0 }
            case .tableTooLong: bytes[directory + 8] = 0xff
            case .flags: bytes[directory + 15] |= 8
            case .granularity: bytes[directory + 17] = 32
            case .granularityLow: bytes[directory + 17] = 8
            case .nameEmpty: bytes[directory + 19] = 0
            case .nameTooLong: bytes[directory + 18] = 4
            case .extraTooLong: bytes[directory + 20] = 0xff
            }
        }
    }

    @Test(arguments: Damage.allCases) func aDamagedDirectoryIsRefusedForWritingOnly(
        damage: Damage
    ) async throws {
        let folder = try Self.folderWithBitmap()
        var bytes = try Self.wholeClusters(folder)
        let (data, directory) = try Self.places(bytes)
        damage.apply(&bytes, data, directory)
        try folder.write(bytes, "a.qcow2")
        await #expect(throws: BlockError.self) {
            try await folder.open("a.qcow2") { _ throws(BlockError) in }
        }
        #expect(try await Self.states(folder, "a.qcow2") == [])
        #expect(try folder.bytes("a.qcow2") == bytes)
    }

    @Test func aDamagedTableMakesItsBitmapInconsistentAlone() async throws {
        let folder = try Self.folderWithBitmap()
        try folder.run(["qemu-img", "bitmap", "--add", "a.qcow2", "c"])
        var bytes = try Self.wholeClusters(folder)
        let directory = try Self.places(bytes).directory
        let table: UInt64 = bytes.withUnsafeBytes { $0.bigEndian(at: directory) }
        // No cluster begins there.
        bytes[Int(table) + 6] = 3
        try folder.write(bytes, "a.qcow2")
        for writable in [false, true] {
            let states = try await folder.open("a.qcow2", writable: writable) {
                edge throws(BlockError) in await Self.states(edge.node)
            }
            #expect(states.map(\.name) == ["b", "c"])
            #expect(states.map(\.isInconsistent) == [true, false])
        }
    }

    /// Makes all entries of the bitmap's table name the cluster of its only data.
    private static func repeatCluster(_ folder: QCOW2TestFolder) throws {
        var bytes = try wholeClusters(folder)
        let directory = try places(bytes).directory
        let table = Int(bytes.withUnsafeBytes { $0.bigEndian(at: directory, as: UInt64.self) })
        let count = Int(bytes.withUnsafeBytes { $0.bigEndian(at: directory + 8, as: UInt32.self) })
        let entries = (0..<count).map { Array(bytes[(table + $0 * 8)..<(table + $0 * 8 + 8)]) }
        let data = try #require(entries.first { $0 != [UInt8](repeating: 0, count: 8) })
        for index in 0..<count {
            bytes.replaceSubrange((table + index * 8)..<(table + index * 8 + 8), with: data)
        }
        try folder.write(bytes, "a.qcow2")
    }

    @Test func bitsOfAnImageThatIsOnlyReadAreLeftUntilSomebodyAsks() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1T"])
        try folder.run(["qemu-img", "bitmap", "--add", "-g", "64k", "a.qcow2", "b"])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "a.qcow2"])
        let good = try folder.bytes("a.qcow2")
        // A few clusters of a file do not stand for a large bitmap.
        try Self.repeatCluster(folder)
        let found = try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            let bitmap = try edge.node.requireDirtyBitmap(named: "b")
            let before = (bitmap.isInconsistent, bitmap.dirtyBytes)
            await bitmap.load()
            return [before.0, before.1 == edge.size, bitmap.isInconsistent]
        }
        // Until then all counts as dirty.
        #expect(found == [false, true, true])
        let written = try await folder.open("a.qcow2") { edge throws(BlockError) in
            try edge.node.requireDirtyBitmap(named: "b").isInconsistent
        }
        #expect(written)
        try folder.write(good, "a.qcow2")
        let states = try await Self.states(folder, "a.qcow2")
        #expect(states.first?.ranges == [ByteRange(1 << 20, 65_536)])
    }

    @Test func withoutTheAutoclearBitBitmapsSayNothing() async throws {
        let folder = try Self.folderWithBitmap()
        var bytes = try Self.wholeClusters(folder)
        bytes[95] &= ~1
        try folder.write(bytes, "a.qcow2")
        #expect(try await Self.states(folder, "a.qcow2") == [])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            _ = try await edge.node.makeDirtyBitmap(named: "b", persistent: true)
        }
        #expect(try await Self.states(folder, "a.qcow2").map(\.ranges) == [[]])
    }

    @Test(arguments: ["type", "extra data"]) func whatIsNotKnownStaysAsItIs(what: String)
        async throws
    {
        let folder = try Self.folderWithBitmap()
        var bytes = try Self.wholeClusters(folder)
        let (data, directory) = try Self.places(bytes)
        if what == "type" {
            bytes[directory + 16] = 7
        } else {
            // 8 bytes of extra data before the name.
            bytes[data + 15] += 8
            bytes[directory + 23] = 8
            bytes[directory + 24 + 8] = bytes[directory + 24]
            for index in 0..<8 { bytes[directory + 24 + index] = UInt8(index) }
        }
        try folder.write(bytes, "a.qcow2")
        let before = Array(bytes[directory..<(directory + 40)])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            #expect(edge.node.dirtyBitmaps.isEmpty)
            try await edge.node.makeDirtyBitmap(named: "new", persistent: true)
            try await Self.write(edge, 0, 512)
        }
        let after = try Self.wholeClusters(folder)
        let place = try Self.places(after).directory
        #expect(Array(after[place..<(place + before.count)]).starts(with: before.prefix(32)))
        #expect(try await Self.states(folder, "a.qcow2").map(\.name) == ["new"])
    }

    @Test func extraDataThatMayBeIgnoredIsKept() async throws {
        let folder = try Self.folderWithBitmap()
        var bytes = try Self.wholeClusters(folder)
        let (data, directory) = try Self.places(bytes)
        bytes[data + 15] += 8
        bytes[directory + 15] |= 4
        bytes[directory + 23] = 8
        bytes[directory + 24 + 8] = bytes[directory + 24]
        for index in 0..<8 { bytes[directory + 24 + index] = UInt8(index + 1) }
        try folder.write(bytes, "a.qcow2")
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.write(edge, 0, 512)
        }
        let after = try Self.wholeClusters(folder)
        let place = try Self.places(after).directory
        #expect(Array(after[(place + 24)..<(place + 32)]) == [1, 2, 3, 4, 5, 6, 7, 8])
        #expect(try await Self.states(folder, "a.qcow2").first?.ranges.count == 2)
    }

    @Test func damageAnywhereInTheirStructuresEndsNoProgram() async throws {
        let folder = try Self.folderWithBitmap()
        let bytes = try Self.wholeClusters(folder)
        let (data, directory) = try Self.places(bytes)
        let table = Int(bytes.withUnsafeBytes { $0.bigEndian(at: directory, as: UInt64.self) })
        for seed in 1...60 {
            var random = QCOW2TestRandom(seed: seed)
            var damaged = bytes
            for _ in 0..<(1 + random.next(below: 3)) {
                let start = [data - 8, directory, table][random.next(below: 3)]
                damaged[start + random.next(below: 32)] = UInt8(random.next(below: 256))
            }
            try folder.write(damaged, "d.qcow2")
            _ = try? await Self.states(folder, "d.qcow2")
            try? await folder.open("d.qcow2") { edge throws(BlockError) in
                try await Self.write(edge, 0, 512)
                for bitmap in edge.node.dirtyBitmaps {
                    try await edge.node.discardDirtyBitmap(bitmap)
                }
            }
        }
    }
}
