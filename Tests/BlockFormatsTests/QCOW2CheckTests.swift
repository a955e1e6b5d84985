import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols
import Foundation
import QMP
import Testing

@testable import BlockFormats

extension QCOW2TestFolder {
    /// Checks an image, in whatever state it is.
    func mendOrCheck(_ name: String, _ repair: CheckRepair = []) async throws -> CheckReport {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let path = self[name]
        return try await thread.run { () async throws(BlockError) -> CheckReport in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
            var inherited = NodeOptions()
            inherited.isForCheck = true
            let node = try await graph.open(
                [
                    "driver": "qcow2", "read-only": .bool(repair.isEmpty),
                    "file": ["driver": "file", "filename": .string(path)],
                ], inheriting: inherited)
            let uses: Permission =
                repair.isEmpty ? .consistentRead : [.consistentRead, .write, .resize]
            let edge = try graph.attach(
                NamedUser("test"), to: node, Access(uses: uses, shares: .all))
            node.release("opening")
            do throws(BlockError) {
                let report = try await edge.check(repair)
                try await graph.detach(edge)
                try await graph.closeAll()
                return report
            } catch {
                // The lock goes with the last use.
                try? await graph.detach(edge)
                try? await graph.closeAll()
                throw error
            }
        }
    }
}

/// An image's bytes, to be damaged.
struct QCOW2Bytes {
    var bytes: [UInt8]

    func number(_ offset: Int) -> UInt64 {
        bytes.withUnsafeBytes { $0.bigEndian(at: offset) }
    }

    mutating func set(_ offset: Int, _ value: UInt64) {
        bytes.withUnsafeMutableBytes { $0.storeBigEndian(value, at: offset) }
    }

    mutating func setCount(_ cluster: Int, _ value: UInt16) {
        let block = Int(number(Int(number(48))))
        bytes.withUnsafeMutableBytes { $0.storeBigEndian(value, at: block + cluster * 2) }
    }

    /// What the entry or field at `place` refers to.
    func offset(_ place: Int) -> Int { Int(number(place) & 0x00ff_ffff_ffff_fe00) }

    var l1: Int { offset(40) }
    var l2: Int { offset(l1) }
    /// The entry of guest cluster `index`.
    func entry(_ index: Int) -> Int { l2 + index * 8 }

    /// The place of the directory of the bitmaps; `nil` for none.
    var bitmapDirectory: Int? {
        var place = 112
        while number(place) >> 32 != 0 {
            let count = Int(number(place) & 0xffff_ffff)
            if number(place) >> 32 == 0x2385_2875 { return Int(number(place + 24)) }
            place += 8 + (count + 7) & ~7
        }
        return nil
    }
}

@Suite struct QCOW2CheckTests {
    static let copied: UInt64 = 1 << 63

    /// An image of 64 KiB clusters with data in its first 17, damaged.
    private func image(
        _ damage: (inout QCOW2Bytes) -> Void = { _ in }
    ) throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        try folder.run([
            "qemu-io", "-c", "write -P 7 0 1M", "-c", "write -P 9 3M 64k", "a.qcow2",
        ])
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        damage(&bytes)
        try folder.write(bytes.bytes, "a.qcow2")
        return folder
    }

    /// What is the same for every repair: QEMU calls the image clean, and so does a second check.
    private func mend(_ folder: QCOW2TestFolder) async throws -> CheckReport {
        let report = try await folder.mendOrCheck("a.qcow2", .all)
        try folder.check("a.qcow2")
        let second = try await folder.mendOrCheck("a.qcow2")
        #expect(second.isClean)
        return report
    }

    @Test func aCleanImageIsClean() async throws {
        let report = try await image().mendOrCheck("a.qcow2")
        #expect(report.isClean)
        #expect(report.totalClusters == 160 && report.allocatedClusters == 17)
        #expect(report.imageEndOffset == 1_441_792)
    }

    @Test func anImageInUseCanBeCheckedAndNotRepaired() async throws {
        let folder = try image()
        let report = try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 200_000)
            vector.fill(5)
            try await edge.write(5 << 20, from: vector)
            try await edge.discard(ByteRange(0, 1 << 19))
            let report = try await edge.check()
            do throws(BlockError) {
                _ = try await edge.check(.all)
                Issue.record("repaired")
            } catch { #expect(error.code == .busy) }
            return report
        }
        #expect(report.isClean && report.allocatedClusters > 8)
    }

    @Test func aLeakIsCountedAndGivenBack() async throws {
        let folder = try image { $0.setCount(5, 3) }
        let found = try await folder.mendOrCheck("a.qcow2")
        #expect(found.leaks == 1)
        // The data's COPIED flag contradicts the count.
        #expect(found.corruptions == 1)
        let mended = try await folder.mendOrCheck("a.qcow2", .leaks)
        #expect(mended.leaksFixed == 1 && mended.leaks == 0)
        try folder.check("a.qcow2")
    }

    @Test func leaksAreRepairedWithoutTouchingAnythingElse() async throws {
        let folder = try image {
            $0.setCount(5, 2)
            $0.setCount(6, 0)
        }
        let report = try await folder.mendOrCheck("a.qcow2", .leaks)
        #expect(report.leaksFixed == 1)
        #expect(report.corruptions > 0 && report.corruptionsFixed == 0)
        #expect(
            try QCOW2Bytes(bytes: folder.bytes("a.qcow2")).number(0x20000 + 8) >> 32 == 0x1_0001)
    }

    @Test func countsThatAreTooLowAreRaised() async throws {
        let folder = try image { for cluster in 4..<9 { $0.setCount(cluster, 0) } }
        let report = try await mend(folder)
        #expect(report.corruptionsFixed == 5)
        #expect(try await folder.contents("a.qcow2")[0..<100].allSatisfy { $0 == 7 })
    }

    @Test func anEntryPastTheEndIsDroppedAndTheRestStays() async throws {
        let folder = try image { $0.set($0.entry(3), 1 << 40 | Self.copied) }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions == 1)
        _ = try await mend(folder)
        let contents = try await folder.contents("a.qcow2")
        #expect(contents[(3 << 16)..<(4 << 16)].allSatisfy { $0 == 0 })
        #expect(contents[0..<(3 << 16)].allSatisfy { $0 == 7 })
        #expect(contents[(4 << 16)..<(16 << 16)].allSatisfy { $0 == 7 })
    }

    @Test(arguments: [
        (UInt64(3) << 57, "reserved bits"), (512, "an offset that is no cluster"),
        (1 << 62, "compressed, with COPIED"),
    ]) func aBrokenEntryIsFoundAndMended(bits: UInt64, what: String) async throws {
        let folder = try image { $0.set($0.entry(3), $0.number($0.entry(3)) | bits) }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions >= 1, "\(what)")
        _ = try await mend(folder)
    }

    @Test func dataThatTwoEntriesNameStaysReadableFromBoth() async throws {
        let folder = try image { $0.set($0.entry(30), $0.number($0.entry(0))) }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions == 1)
        _ = try await mend(folder)
        let contents = try await folder.contents("a.qcow2")
        #expect(contents[0..<65536] == contents[(30 << 16)..<(31 << 16)])
        // A write to one of them makes a copy.
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 65536)
            vector.fill(1)
            try await edge.write(0, from: vector)
        }
        #expect(try await folder.contents("a.qcow2")[30 << 16] == 7)
    }

    @Test func aWrongCopiedFlagIsFoundAndMended() async throws {
        let folder = try image { $0.set($0.entry(2), $0.number($0.entry(2)) & ~Self.copied) }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions == 1)
        #expect(try await mend(folder).corruptionsFixed == 1)
    }

    @Test(arguments: [
        (UInt64(0), "no refcount block"), (0x20200, "a block that is no cluster"),
        (1 << 50, "a block past the end"), (0x30000, "a block in the L1 table"),
        (0x10000, "a block in the refcount table itself"),
    ]) func brokenRefcountStructuresAreMadeAnew(entry: UInt64, what: String) async throws {
        let folder = try image { $0.set(Int($0.number(48)), entry) }
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions > 0, "\(what)")
        _ = try await mend(folder)
        #expect(try await folder.contents("a.qcow2")[0..<(1 << 20)].allSatisfy { $0 == 7 })
    }

    @Test(arguments: [
        (UInt64(0x30000), "itself"), (0x20000, "a refcount block"), (0x10000, "the refcount table"),
    ]) func anL1EntryInsideOfAStructureIsDroppedNotFollowed(entry: UInt64, what: String)
        async throws
    {
        let folder = try image { $0.set($0.l1, entry | Self.copied) }
        _ = try await mend(folder)
    }

    @Test func dataOverTheL1TableMakesTheTableMove() async throws {
        let folder = try image { $0.set($0.entry(40), UInt64($0.l1) | Self.copied) }
        let old = try QCOW2Bytes(bytes: folder.bytes("a.qcow2")).l1
        _ = try await mend(folder)
        #expect(try QCOW2Bytes(bytes: folder.bytes("a.qcow2")).l1 != old)
        #expect(try await folder.contents("a.qcow2")[0..<(1 << 20)].allSatisfy { $0 == 7 })
    }

    @Test func marksGoWhenTheImageIsClean() async throws {
        let folder = try image {
            $0.set(72, 3)
            $0.setCount(5, 0)
        }
        _ = try await mend(folder)
        #expect(try QCOW2Bytes(bytes: folder.bytes("a.qcow2")).number(72) == 0)
    }

    @Test func aDirtyImageIsRepairedWhenItIsOpenedForWriting() async throws {
        let folder = try image {
            $0.set(72, 1)
            for cluster in 4..<20 { $0.setCount(cluster, 0) }
        }
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 65536)
            vector.fill(1)
            try await edge.write(8 << 20, from: vector)
        }
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2")[0..<(1 << 20)].allSatisfy { $0 == 7 })
    }

    @Test func snapshotsThatLeadNowhereGoAndTheOthersStay() async throws {
        let folder = try image()
        for name in ["one", "two", "three"] {
            try folder.run(["qemu-img", "snapshot", "-c", name, "a.qcow2"])
        }
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        let table = Int(bytes.number(64))
        let second = table + (40 + 24 + 1 + 3 + 7) & ~7
        bytes.set(second, 1 << 41)
        try folder.write(bytes.bytes, "a.qcow2")
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions > 0)
        _ = try await mend(folder)
        let list = try folder.run(["qemu-img", "snapshot", "-l", "a.qcow2"])
        #expect(list.contains("one") && list.contains("three") && !list.contains("two"))
    }

    @Test func aBrokenBitmapGoesAndTheOthersStay() async throws {
        let folder = try image()
        for name in ["one", "two"] {
            try folder.run(["qemu-img", "bitmap", "--add", "a.qcow2", name])
        }
        try folder.run(["qemu-io", "-c", "write 0 64k", "a.qcow2"])
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        let end = try QCOW2HeaderTests.parse(bytes.bytes)
        let data = end.extensions.first { $0.type == QCOW2.HeaderExtension.bitmaps }?.data ?? []
        let directory = Int(QCOW2Bytes(bytes: data).number(16))
        bytes.set(directory, 0x200)
        try folder.write(bytes.bytes, "a.qcow2")
        #expect(try await folder.mendOrCheck("a.qcow2").corruptions > 0)
        _ = try await mend(folder)
        let info = try folder.run(["qemu-img", "info", "a.qcow2"])
        #expect(info.contains("name: two") && !info.contains("name: one"))
    }

    @Test func whatOneBitRefcountsCannotCountIsDropped() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", "a.qcow2", "10M",
        ])
        try folder.run(["qemu-io", "-c", "write -P 7 0 1M", "a.qcow2"])
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        for index in 20..<25 { bytes.set(bytes.entry(index), bytes.number(bytes.entry(0))) }
        try folder.write(bytes.bytes, "a.qcow2")
        _ = try await mend(folder)
    }

    @Test func nothingIsRepairedWhenATableCannotBeRead() async throws {
        let folder = try image { $0.setCount(5, 3) }
        let before = try folder.bytes("a.qcow2")
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let path = folder["a.qcow2"]
        let report = try await thread.run { () async throws(BlockError) -> CheckReport in
            let graph = BlockGraph(
                on: thread, registry: DriverRegistry(BlockProtocols.drivers + [Unreadable.driver]))
            let node = try await graph.open([
                "driver": "unreadable", "file": ["driver": "file", "filename": .string(path)],
            ])
            let edge = try graph.attach(
                NamedUser("test"), to: node,
                Access(uses: [.consistentRead, .write, .resize], shares: .all))
            let check = QCOW2Check(
                edge, try await QCOW2Check.readHeader(edge), thread: thread, repair: .all
            ) { _ in }
            let report = try await check.run()
            node.release("opening")
            try await graph.detach(edge)
            try await graph.closeAll()
            return report
        }
        #expect(report.checkErrors == 1 && report.leaksFixed == 0)
        #expect(try folder.bytes("a.qcow2") == before)
    }

    /// Fails reads of the L2 table of the test's image.
    private final class Unreadable: FilterDriver, @unchecked Sendable {
        let child: Edge
        init(_ child: Edge) { self.child = child }

        static let driver = DriverDescription(name: "unreadable", kind: .filter) {
            opening throws(BlockError) in
            let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
            opening.node.size = child.size
            return Unreadable(child)
        }

        func read(
            _ offset: Int, into vector: IOVector, _ flags: ReadFlags
        ) async throws(BlockError) {
            guard ByteRange(offset, vector.count).intersection(ByteRange(0x40000, 1)) == nil else {
                throw BlockError(.inputOutput, "the disk is broken")
            }
            try await child.read(offset, into: vector, flags)
        }

        func write(
            _ offset: Int, from vector: IOVector, _ flags: WriteFlags
        ) async throws(BlockError) { try await child.write(offset, from: vector, flags) }
        func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
            try await child.writeZeroes(range, flags)
        }
        func discard(_ range: ByteRange) async throws(BlockError) { try await child.discard(range) }
        func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
            try await child.resize(to: size, preallocation)
        }
    }
}

@Suite struct QCOW2ReferenceCountsTests {
    typealias Counts = QCOW2ReferenceCounts

    /// Against a plain dictionary, over many small windows.
    @Test(arguments: 0..<20) func countsAreThoseOfAModelWhateverTheMemory(seed: Int) {
        var model: [Int: UInt64] = [:]
        var random = QCOW2TestRandom(seed: seed)
        var adds: [(Int, Int, Counts.Reference, Int)] = []
        for _ in 0..<400 {
            let first = random.next(below: 60) * 3000 + random.next(below: 5000)
            let count = 1 + random.next(below: random.next(below: 2) == 0 ? 3 : 9000)
            let kind: Counts.Reference = [.copied, .copied, .shared, .plain][random.next(below: 4)]
            let times = random.next(below: 5) == 0 ? 1 + random.next(below: 70) : 1
            adds.append((first, count, kind, times))
            for cluster in first..<(first + count) { model[cluster, default: 0] += UInt64(times) }
        }
        var start = 0
        var windows = 0
        var total = 0
        while true {
            let counts = Counts(from: start, budget: 40_000)
            let end = counts.window.upperBound
            for (first, count, kind, times) in adds { counts.add(first, count, kind, times: times) }
            windows += 1
            var rest = counts.window.clamped(to: 0..<300_000)
            while let cluster = counts.firstUsed(in: rest) {
                #expect(counts.count(of: cluster) == model[cluster], "seed \(seed)")
                total += 1
                rest = (cluster + 1)..<rest.upperBound
            }
            if counts.window.upperBound == end { break }
            start = counts.window.upperBound
        }
        #expect(total == model.count, "seed \(seed)")
        #expect(windows > 1)
    }

    @Test func flagsThatContradictACountAreSeen() {
        let counts = Counts(from: 0)
        counts.add(0, 1, .copied)
        counts.add(1, 1, .shared)
        counts.add(2, 1, .plain)
        counts.add(3, 1, .copied)
        counts.add(3, 1, .plain)
        counts.add(4, 1, .shared, times: 2)
        #expect((0..<6).map(counts.hasWrongFlag) == [false, true, false, true, false, false])
    }
}
