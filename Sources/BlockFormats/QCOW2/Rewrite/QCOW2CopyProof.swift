import BlockCore
import BlockGraph

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Compares an image with a copy of its own layer: disk, snapshots with what they hold of a machine's
/// state, bitmaps, keys, header. What is below the image plays no part.
///
/// It follows the tables of both files, each from its own header on. A cluster that is not there and one
/// of zeroes are the same where there is no backing image, and else are not. Counts of references
/// are for a check of the copy.
///
/// Confined to the graph's thread.
final class QCOW2CopyProof: @unchecked Sendable {
    private let old: QCOW2Driver
    private let new: QCOW2Driver
    private let geometry: QCOW2.Geometry
    private let progress: (Int) -> Void
    /// What is not there reads as what is below.
    private let hidesBacking: Bool

    init(_ old: QCOW2Driver, _ new: QCOW2Driver, _ progress: @escaping (Int) -> Void) {
        self.old = old
        self.new = new
        self.progress = progress
        geometry = old.geometry
        hidesBacking = !old.image.header.backingName.isEmpty
    }

    func run() async throws(BlockError) {
        guard Self.comparable(old) == Self.comparable(new) else { throw difference("header") }
        guard Self.comparable(old.snapshots) == Self.comparable(new.snapshots) else {
            throw difference("table of snapshots")
        }
        try await compareKeys()
        try await compareBitmaps()
        try await compareMaps()
    }

    private func difference(_ what: String) -> BlockError {
        BlockError(
            .corrupt, "the rewritten image is not the same: its \(what) differs",
            remedy: "the image is as it was; check the storage")
    }

    // MARK: Header

    /// The header, but for where things are.
    private static func comparable(_ driver: QCOW2Driver) -> QCOW2.Header {
        var header = driver.image.header
        header.l1Offset = 0
        header.refcountTableOffset = 0
        header.refcountTableClusters = 0
        header.snapshotsOffset = 0
        header.moveEncryptionHeader(to: 0)
        header.autoclear.formIntersection(.known)
        header.extensions.removeAll { $0.type == QCOW2.HeaderExtension.bitmaps }
        if driver.bitmaps.entries.isEmpty { header.autoclear.remove(.bitmaps) }
        return header
    }

    private static func comparable(_ snapshots: [QCOW2.Snapshot]) -> [QCOW2.Snapshot] {
        snapshots.map {
            var snapshot = $0
            snapshot.l1Offset = 0
            return snapshot
        }
    }

    private func compareKeys() async throws(BlockError) {
        guard let first = old.image.header.encryptionHeader,
            let second = new.image.header.encryptionHeader
        else { return }
        guard try await isSame(first.count, old: first.offset, new: second.offset) else {
            throw difference("encryption header")
        }
    }

    /// Compares bytes of both files.
    private func isSame(_ count: Int, old: Int, new: Int) async throws(BlockError) -> Bool {
        let vectors = (try IOVector(allocating: count), try IOVector(allocating: count))
        try await self.old.readFile(old, into: vectors.0)
        try await self.new.readFile(new, into: vectors.1)
        return Self.isSame(vectors.0, vectors.1)
    }

    private static func isSame(_ first: IOVector, _ second: IOVector) -> Bool {
        guard let first = first.single, let second = second.single else { return false }
        return UnsafeRawBufferPointer(first.bytes).elementsEqualFast(second.bytes)
    }

    // MARK: Bitmaps

    private func compareBitmaps() async throws(BlockError) {
        guard old.bitmaps.entries.count == new.bitmaps.entries.count, new.bitmaps.failure == nil
        else { throw difference("list of dirty bitmaps") }
        for (first, second) in zip(old.bitmaps.entries, new.bitmaps.entries) {
            var moved = second
            moved.tableOffset = first.tableOffset
            guard moved == first, try await haveSameBits(first, second) else {
                throw difference("dirty bitmap '\(QCOW2Check.printable(first.name))'")
            }
        }
    }

    private func haveSameBits(
        _ first: QCOW2.BitmapEntry, _ second: QCOW2.BitmapEntry
    ) async throws(BlockError) -> Bool {
        let firstTable = try await old.bitmapTable(first)
        let secondTable = try await new.bitmapTable(second)
        for (one, other) in zip(firstTable, secondTable) where one | other != 0 {
            let bits = (
                try await Self.bits(one, of: old), try await Self.bits(other, of: new)
            )
            guard Self.isSame(bits.0, bits.1) else { return false }
        }
        return true
    }

    private static func bits(
        _ raw: UInt64, of driver: QCOW2Driver
    ) async throws(BlockError) -> IOVector {
        let entry = QCOW2.BitmapTableEntry(rawValue: raw)
        let vector = try IOVector(allocating: driver.geometry.clusterSize)
        if entry.offset == 0 {
            vector.fill(entry.isAllOnes ? 0xff : 0)
        } else {
            try await driver.readFile(entry.offset, into: vector)
        }
        return vector
    }

    // MARK: Maps

    private struct Pair: Hashable {
        let old: UInt64
        let new: UInt64
        var oldBitmap: UInt64 = 0
        var newBitmap: UInt64 = 0
    }

    private func compareMaps() async throws(BlockError) {
        let maps = (old: QCOW2Maps(of: old), new: QCOW2Maps(of: new))
        let lanes = RequestLanes(on: old.node.seat)
        do throws(BlockError) {
            for window in maps.old.windows {
                let first = try await maps.old.entries(window, in: old.file)
                let second = try await maps.new.entries(window, in: new.file)
                for step in 0..<window.count {
                    var pairs: Set<Pair> = []
                    for map in first.indices where step < first[map].count {
                        pairs.insert(Pair(old: first[map][step], new: second[map][step]))
                    }
                    pairs.remove(Pair(old: 0, new: 0))
                    if pairs.isEmpty { continue }
                    try await compareTables(Array(pairs), window.lowerBound + step, lanes)
                }
            }
        } catch {
            try? await lanes.finish()
            throw error
        }
        try await lanes.finish()
    }

    /// Compares pairs of tables that map the part `index` of the disk.
    private func compareTables(
        _ pairs: [Pair], _ index: Int, _ lanes: RequestLanes
    ) async throws(BlockError) {
        var hosts: (old: [Int], new: [Int]) = ([], [])
        for pair in pairs {
            hosts.old.append(try old.tableHost(pair.old))
            hosts.new.append(try new.tableHost(pair.new))
        }
        let partBytes = QCOW2TablePart.bytes(pairs.count, geometry)
        let first = try QCOW2TablePart(pairs.count, partBytes, geometry)
        let second = try QCOW2TablePart(pairs.count, partBytes, geometry)
        for start in stride(from: 0, to: geometry.clusterSize, by: partBytes) {
            try await first.load(hosts.old, from: start, of: old)
            try await second.load(hosts.new, from: start, of: new)
            progress(pairs.count * partBytes)
            let guest =
                index << geometry.l2CoverageBits
                + (start >> geometry.l2EntryShift) << geometry.clusterBits
            for entry in 0..<first.entryCount {
                try await compareEntries(
                    first, second, entry, pairs.count, guest + entry << geometry.clusterBits, lanes)
            }
        }
    }

    private func compareEntries(
        _ first: QCOW2TablePart, _ second: QCOW2TablePart, _ index: Int, _ tableCount: Int,
        _ guest: Int, _ lanes: RequestLanes
    ) async throws(BlockError) {
        var seen: Set<Pair> = []
        for table in 0..<tableCount {
            let (one, other) = (first[table, index], second[table, index])
            guard one.rawValue | other.rawValue | one.bitmap | other.bitmap != 0 else { continue }
            let pair = Pair(
                old: one.rawValue, new: other.rawValue, oldBitmap: one.bitmap,
                newBitmap: other.bitmap)
            if tableCount > 1, !seen.insert(pair).inserted { continue }
            if old.hasDataFile {
                guard one == other else { throw difference("map at \(guest)") }
                continue
            }
            guard shows(one, of: old) == shows(other, of: new) else {
                throw difference("map at \(guest)")
            }
            guard hasData(one, of: old) || hasData(other, of: new) else { continue }
            await lanes.waitForRoom()
            if let failure = lanes.failure { throw failure }
            await lanes.start { [self] () throws(BlockError) in
                try await compareData(one, other, guest)
            }
            progress(geometry.clusterSize)
        }
    }

    // MARK: Clusters

    private func kind(
        _ entry: QCOW2.L2Entry, _ sub: Int, of driver: QCOW2Driver
    ) -> QCOW2.L2Entry.Kind {
        geometry.hasSubclusters
            ? entry.kind(ofSubcluster: sub) : entry.kind(hasZeroFlag: driver.hasZeroFlag)
    }

    private var subclusterCount: Int { geometry.hasSubclusters ? 32 : 1 }

    /// Subclusters, as bits, that show what is below.
    private func shows(_ entry: QCOW2.L2Entry, of driver: QCOW2Driver) -> UInt64 {
        guard hidesBacking else { return 0 }
        return (0..<subclusterCount).reduce(0) { bits, sub in
            kind(entry, sub, of: driver) == .unallocated ? bits | 1 << UInt64(sub) : bits
        }
    }

    private func hasData(_ entry: QCOW2.L2Entry, of driver: QCOW2Driver) -> Bool {
        (0..<subclusterCount).contains { sub in
            let kind = kind(entry, sub, of: driver)
            return kind == .normal || kind == .compressed
        }
    }

    private func compareData(
        _ one: QCOW2.L2Entry, _ other: QCOW2.L2Entry, _ guest: Int
    ) async throws(BlockError) {
        let first = try await content(one, guest, of: old)
        let second = try await content(other, guest, of: new)
        guard Self.isSame(first, second) else { throw difference("data at \(guest)") }
    }

    /// A cluster of this layer, with zeroes where it has nothing.
    private func content(
        _ entry: QCOW2.L2Entry, _ guest: Int, of driver: QCOW2Driver
    ) async throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: geometry.clusterSize)
        if entry.isCompressed {
            let plain = entry.rawValue & ~QCOW2.L2Entry.copiedFlag
            try await driver.readCompressed(QCOW2.L2Entry(rawValue: plain), guest, into: vector)
            return vector
        }
        guard hasData(entry, of: driver) else {
            vector.fill(0)
            return vector
        }
        if driver.encryption?.cipher != nil {
            try await driver.readEncrypted(entry.offset, guest, into: vector)
        } else {
            try await driver.readStored(entry.offset, into: vector)
        }
        let unit = 1 << geometry.unitBits
        for sub in 0..<subclusterCount where kind(entry, sub, of: driver) != .normal {
            vector.zero(sub * unit, unit)
        }
        return vector
    }
}

extension UnsafeRawBufferPointer {
    /// Whether both hold the same bytes.
    fileprivate func elementsEqualFast(_ other: UnsafeMutableRawBufferPointer) -> Bool {
        guard count == other.count, let first = baseAddress, let second = other.baseAddress else {
            return count == other.count
        }
        return memcmp(first, second, count) == 0
    }
}
