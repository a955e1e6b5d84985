import BlockCore

// The entries of one L2 table.

extension QCOW2Check {
    /// Bits 1–8 and 56–61 of an entry for a standard cluster (§L2 table entry).
    private static let reservedMask: UInt64 = 0x3f00_0000_0000_01fe
    private static let copiedFlag = QCOW2.L2Entry.copiedFlag
    private static let allocatedBits: UInt64 = 0xffff_ffff
    private static let zeroBits: UInt64 = 0xffff_ffff << 32

    /// One entry, with the subcluster bitmap that follows it in images with extended entries.
    private struct Entry: Equatable {
        var raw: UInt64
        var bitmap: UInt64 = 0
    }

    /// Counts what a table refers to, and in the survey looks for what is wrong in it.
    func countEntries(
        _ host: Int, _ table: IOSlice, _ use: (active: Int, other: Int),
        _ counts: QCOW2ReferenceCounts
    ) {
        let bytes = UnsafeRawBufferPointer(table.bytes)
        let step = entryBytes
        /// Where the next cluster would not be a fragment; per table.
        var next = 0
        var position = 0
        while position < bytes.count {
            let raw: UInt64 = bytes.bigEndian(at: position)
            if step == 8 {
                if raw == 0 {
                    position += 8
                    continue
                }
                let run = plainRun(bytes, position, raw)
                if run > 0 {
                    count(run, at: Int(raw & QCOW2.L2Entry.offsetMask), use, counts, &next)
                    position += run * 8
                    continue
                }
            }
            let bitmap: UInt64 = step == 16 ? bytes.bigEndian(at: position + 8) : 0
            let old = Entry(raw: raw, bitmap: bitmap)
            let new = examine(old, "entry \(position / step) of the L2 table at \(host)", use)
            if new != old { hasFaultyEntries = true }
            countOne(new, use, counts, &next)
            position += step
        }
    }

    /// Calls `body` for each entry that is neither 0 nor what nearly all are.
    ///
    /// - Returns: how many are what nearly all are.
    private func forEachUnusual(
        _ table: IOSlice, _ body: (_ position: Int, _ entry: Entry) -> Void
    ) -> Int {
        let bytes = UnsafeRawBufferPointer(table.bytes)
        var plainCount = 0
        var position = 0
        while position < bytes.count {
            let raw: UInt64 = bytes.bigEndian(at: position)
            let run = entryBytes == 8 && raw != 0 ? plainRun(bytes, position, raw) : 0
            if run > 0 {
                plainCount += run
                position += run * 8
                continue
            }
            let bitmap: UInt64 = entryBytes == 16 ? bytes.bigEndian(at: position + 8) : 0
            if raw != 0 || bitmap != 0 { body(position, Entry(raw: raw, bitmap: bitmap)) }
            position += entryBytes
        }
        return plainCount
    }

    /// Mends what is wrong in a table.
    ///
    /// - Returns: the bytes of the table that changed.
    func mendEntries(of table: IOSlice) -> Range<Int>? {
        var changed: Range<Int>?
        _ = forEachUnusual(table) { position, old in
            let new = mended(old) { _ in }
            if new == old { return }
            table.bytes.storeBigEndian(new.raw, at: position)
            if entryBytes == 16 { table.bytes.storeBigEndian(new.bitmap, at: position + 8) }
            changed = (changed?.lowerBound ?? position)..<(position + entryBytes)
        }
        return changed
    }

    /// How much a cluster looks like an L2 table: entries in it, but for those that are 0.
    struct Looks {
        var soundCount = 0
        var faultyCount = 0
        /// Sound, but for leading past the end of a file that may have been cut.
        var farCount = 0
    }

    func appraise(_ table: IOSlice) -> Looks {
        var looks = Looks()
        // What the file of a full disk would have.
        let farEnd = max(fileSize, header.size.multiplied(by: 2) ?? .max)
        let plainCount = forEachUnusual(table) { _, entry in
            if mended(entry, { _ in }) == entry {
                looks.soundCount += 1
            } else if mended(entry, placesEnd: farEnd, { _ in }) == entry {
                looks.farCount += 1
            } else {
                looks.faultyCount += 1
            }
        }
        looks.soundCount += plainCount
        return looks
    }

    /// How many entries from `position` on name data clusters that follow each other, with COPIED
    /// set and nothing else: nearly all of them are such.
    @inline(__always)
    private func plainRun(_ bytes: UnsafeRawBufferPointer, _ position: Int, _ raw: UInt64) -> Int {
        let offset = raw & QCOW2.L2Entry.offsetMask
        guard !hasDataFile, raw == offset | Self.copiedFlag, offset != 0,
            Int(offset).isAligned(to: geometry.clusterSize), Int(offset) < offsetEnd
        else { return 0 }
        let most = min(
            (bytes.count - position) / 8, (offsetEnd - 1 - Int(offset)) >> clusterBits + 1)
        var expected = raw
        var count = 1
        while count < most {
            expected &+= 1 << UInt64(clusterBits)
            if bytes.bigEndian(at: position + count * 8, as: UInt64.self) != expected { break }
            count += 1
        }
        return count
    }

    private func count(
        _ run: Int, at offset: Int, _ use: (active: Int, other: Int),
        _ counts: QCOW2ReferenceCounts, _ next: inout Int
    ) {
        let first = offset >> clusterBits
        if use.active > 0 { counts.add(first, run, .copied, times: use.active) }
        if use.other > 0 { counts.add(first, run, .plain, times: use.other) }
        noteAllocated(run, at: offset, use.active, &next)
    }

    private func noteAllocated(_ run: Int, at offset: Int, _ times: Int, _ next: inout Int) {
        guard reports, times > 0 else { return }
        report.allocatedClusters += run * times
        if next != 0, next != offset { report.fragmentedClusters += times }
        next = offset + run << clusterBits
    }

    private func countOne(
        _ entry: Entry, _ use: (active: Int, other: Int), _ counts: QCOW2ReferenceCounts,
        _ next: inout Int
    ) {
        let l2 = QCOW2.L2Entry(rawValue: entry.raw)
        if l2.isCompressed {
            if reports {
                report.allocatedClusters += use.active
                report.compressedClusters += use.active
                report.fragmentedClusters += use.active
            }
            guard let place = compressedPlace(l2) else { return }
            let first = place.offset >> clusterBits
            counts.add(
                first, (place.end - 1) >> clusterBits - first + 1, .plain,
                times: use.active + use.other)
            return
        }
        // In a data file, guest cluster 0 is at 0.
        if l2.offset == 0, !(hasDataFile && l2.isCopied && !isZero(l2)) { return }
        noteAllocated(1, at: l2.offset, use.active, &next)
        guard l2.offset.isAligned(to: geometry.clusterSize) else {
            countUnaligned(l2.offset, use.active + use.other, counts)
            return
        }
        if hasDataFile, !l2.isCopied, use.active > 0 { suspectsDataFlags = true }
        guard !hasDataFile, l2.offset < offsetEnd else { return }
        let first = l2.offset >> clusterBits
        if use.active > 0 {
            counts.add(first, 1, l2.isCopied ? .copied : .shared, times: use.active)
        }
        if use.other > 0 { counts.add(first, 1, .plain, times: use.other) }
    }

    /// Bit 0 has its meaning in plain entries of version 3.
    private func isZero(_ entry: QCOW2.L2Entry) -> Bool {
        entry.isZero && header.version == 3 && !hasExtendedEntries
    }

    /// An entry that stays as it is has bytes in two clusters: neither is a leak.
    private func countUnaligned(_ offset: Int, _ times: Int, _ counts: QCOW2ReferenceCounts) {
        guard !mendsErrors, !hasDataFile, offset < offsetEnd else { return }
        let first = offset >> clusterBits
        let last = min(offset + geometry.clusterSize, fileSize) - 1
        counts.add(first, last >> clusterBits - first + 1, .plain, times: times)
    }

    /// The bytes of a compressed cluster; `nil` where it has none in this file.
    private func compressedPlace(_ entry: QCOW2.L2Entry) -> ByteRange? {
        let place = QCOW2.CompressedDescriptor(entry, clusterBits: clusterBits)
        guard !hasDataFile,
            let range = ByteRange(checking: place.offset, count: place.byteCount),
            range.end - fileSize < geometry.clusterSize, range.offset < offsetEnd
        else { return nil }
        return range
    }

    // MARK: What is wrong

    /// The entry as it should be. Where that is another, it is reported.
    private func examine(
        _ entry: Entry, _ name: @autoclosure () -> String, _ use: (active: Int, other: Int)
    ) -> Entry {
        guard reports || judges else { return entry }
        let new = mended(entry) { text in
            corruption("\(name()) \(text)", times: use.active + use.other, mended: true)
        }
        return judges ? new : entry
    }

    /// The entry as a repair leaves it.
    ///
    /// - Parameters:
    ///   - placesEnd: where in the file clusters must begin before; `nil` for where they can.
    ///   - wrong: gets what is wrong with it.
    private func mended(
        _ entry: Entry, placesEnd: Int? = nil, _ wrong: (String) -> Void
    ) -> Entry {
        var new = entry
        let l2 = QCOW2.L2Entry(rawValue: entry.raw)
        if l2.isCompressed {
            if l2.isCopied {
                wrong("is compressed and has the COPIED flag")
                new.raw &= ~Self.copiedFlag
            }
            if entry.bitmap != 0 {
                wrong("is compressed and has subclusters")
                new.bitmap = 0
            }
            if compressedPlace(l2) == nil {
                wrong("is compressed, at a place that the file does not have")
                new = dropped
            }
            return new
        }
        if l2.rawValue & Self.reservedMask != 0 {
            wrong("has reserved bits: \(hex(l2.rawValue))")
            new.raw &= ~Self.reservedMask
        }
        // Bit 0 is the flag for zeroes in plain entries of version 3, reserved in all others.
        if l2.isZero, header.version == 2 || hasExtendedEntries {
            wrong("has a flag for zeroes that images of its kind do not have")
            new.raw &= ~QCOW2.L2Entry.zeroFlag
        }
        if hasExtendedEntries { examineSubclusters(&new, wrong) }
        if l2.offset != 0 {
            if !l2.offset.isAligned(to: geometry.clusterSize) {
                wrong("names \(l2.offset), which is no cluster")
                new = dropped
            } else if !hasDataFile, l2.offset >= placesEnd ?? offsetEnd {
                wrong("names cluster \(l2.offset >> clusterBits), past the end of the file")
                new = dropped
            }
        } else if l2.isCopied, mendsErrors, !hasDataFile {
            // Harmless without a cluster, and not worth a report.
            new.raw &= ~Self.copiedFlag
        }
        return new
    }

    private func examineSubclusters(_ entry: inout Entry, _ wrong: (String) -> Void) {
        let both = entry.bitmap & (entry.bitmap >> 32) & Self.allocatedBits
        if both != 0 {
            wrong("has subclusters that are data and zeroes at once")
            entry.bitmap &= ~(both << 32)
        }
        if QCOW2.L2Entry(rawValue: entry.raw).offset == 0, !hasDataFile,
            entry.bitmap & Self.allocatedBits != 0
        {
            wrong("has subclusters with data, and no cluster")
            entry.bitmap &= ~Self.allocatedBits
        }
    }

    /// An entry whose data is lost: it reads as zeroes, as what lies past the end of a file does.
    private var dropped: Entry {
        if hasExtendedEntries { return Entry(raw: 0, bitmap: Self.zeroBits) }
        return Entry(raw: header.version == 3 ? QCOW2.L2Entry.zeroFlag : 0)
    }

    // MARK: References that are too many

    /// Drops entries of clusters that have more references than the refcounts can count.
    ///
    /// - Parameter excess: references to drop, by cluster; falls.
    /// - Returns: the bytes of the table that changed.
    func dropExcess(
        _ table: IOSlice, _ use: (active: Int, other: Int), _ excess: inout [Int: UInt64]
    ) -> Range<Int>? {
        let bytes = UnsafeRawBufferPointer(table.bytes)
        var changed: Range<Int>?
        for position in stride(from: 0, to: bytes.count, by: entryBytes) {
            let raw: UInt64 = bytes.bigEndian(at: position)
            if raw == 0 { continue }
            let clusters = clusters(of: QCOW2.L2Entry(rawValue: raw))
            guard let over = clusters.first(where: { excess[$0, default: 0] > 0 }) else { continue }
            note("Repaired: a reference too many to cluster \(over) is dropped")
            report.corruptionsFixed += 1
            for cluster in clusters {
                if let left = excess[cluster] {
                    excess[cluster] = left - min(left, UInt64(use.active + use.other))
                }
            }
            table.bytes.storeBigEndian(dropped.raw, at: position)
            if entryBytes == 16 { table.bytes.storeBigEndian(dropped.bitmap, at: position + 8) }
            changed = (changed?.lowerBound ?? position)..<(position + entryBytes)
        }
        return changed
    }

    /// The clusters of the file that an entry refers to.
    private func clusters(of entry: QCOW2.L2Entry) -> Range<Int> {
        if entry.isCompressed {
            guard let place = compressedPlace(entry) else { return 0..<0 }
            return place.offset >> clusterBits..<(place.end - 1) >> clusterBits + 1
        }
        let first = entry.offset >> clusterBits
        return hasDataFile || entry.offset == 0 ? 0..<0 : first..<(first + 1)
    }

    // MARK: Flags

    /// Compares the COPIED flags of a table of the active L1 table with the refcounts.
    ///
    /// - Parameter count: the refcount of a cluster; `nil` outside of what is known.
    /// - Returns: the bytes of the table that were repaired.
    func checkFlags(
        _ table: IOSlice, _ wrongCount: inout Int, _ count: (Int) -> UInt64?
    ) -> Range<Int>? {
        let bytes = UnsafeRawBufferPointer(table.bytes)
        var changed: Range<Int>?
        for position in stride(from: 0, to: bytes.count, by: entryBytes) {
            let raw: UInt64 = bytes.bigEndian(at: position)
            let entry = QCOW2.L2Entry(rawValue: raw)
            if entry.isCompressed || entry.offset == 0 { continue }
            guard entry.offset.isAligned(to: geometry.clusterSize),
                let count = count(entry.offset >> clusterBits),
                (count == 1) != entry.isCopied
            else { continue }
            wrongCount += 1
            note(
                "\(mendsFlags ? "Repairing" : "ERROR") OFLAG_COPIED data cluster: "
                    + "l2_entry=\(String(raw, radix: 16)) refcount=\(count)")
            guard mendsFlags else { continue }
            table.bytes.storeBigEndian(raw ^ Self.copiedFlag, at: position)
            changed = (changed?.lowerBound ?? position)..<(position + 8)
        }
        return changed
    }
}
