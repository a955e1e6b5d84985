import BlockCore
import BlockGraph

// Extended L2 entries: clusters whose 32 subclusters have states of their own.
//
// A write to a new cluster allocates the subclusters that it touches; the others stay what they are. A
// write to a cluster that is there, but not in all of its subclusters, fills those that it touches in
// place. Zeroes are of subclusters, discards of whole clusters.

extension QCOW2Driver {
    /// Entry `index` of a slice.
    @inline(__always)
    func entry(_ slice: QCOW2TableCache.Slice, _ index: Int) -> QCOW2.L2Entry {
        if !hasSubclusters { return QCOW2.L2Entry(rawValue: slice[index]) }
        return QCOW2.L2Entry(rawValue: slice[index << 1], bitmap: slice[index << 1 + 1])
    }

    @inline(__always)
    func setEntry(_ slice: QCOW2TableCache.Slice, _ index: Int, _ entry: QCOW2.L2Entry) {
        if hasSubclusters {
            slice[index << 1] = entry.rawValue
            slice[index << 1 + 1] = entry.bitmap
        } else {
            slice[index] = entry.rawValue
        }
    }

    /// A data cluster that is allocated as a whole.
    func wholeEntry(_ offset: Int) -> QCOW2.L2Entry {
        QCOW2.L2Entry(
            cluster: offset, bitmap: hasSubclusters ? QCOW2.L2Entry.allAllocated : 0)
    }

    /// ``run(_:_:_:)`` with subclusters: of those that are alike, in clusters that follow each other.
    func subclusterRun(_ slice: QCOW2TableCache.Slice, _ offset: Int, _ limit: Int) -> Run {
        let mask = 1 << sliceEntryBits - 1
        let bits = geometry.clusterBits
        let unit = 1 << geometry.unitBits
        var index = (offset >> bits) & mask
        var sub = (offset >> geometry.unitBits) & 31
        let first = entry(slice, index)
        let kind = first.kind(ofSubcluster: sub, hasDataFile: hasDataFile)
        if kind == .compressed {
            return Run(
                kind: kind, host: Int(truncatingIfNeeded: first.rawValue),
                count: min(limit, 1 << bits - offset & (1 << bits - 1)), isCopied: false)
        }
        let hasHost = kind == .normal || kind == .zeroAllocated
        var current = first
        var count = unit - offset & (unit - 1)
        while count < limit {
            sub += 1
            if sub == 32 {
                guard index < mask else { break }
                index += 1
                sub = 0
                let next = entry(slice, index)
                if hasHost, next.rawValue != current.rawValue &+ UInt64(1 << bits) { break }
                current = next
            }
            if current.kind(ofSubcluster: sub, hasDataFile: hasDataFile) != kind { break }
            count += unit
        }
        return Run(
            kind: kind, host: hasHost ? first.offset + offset & (1 << bits - 1) : 0,
            count: min(count, limit), isCopied: first.isCopied)
    }

    /// Whether new data for a cluster with this entry may leave its other subclusters alone: they
    /// are in the same cluster already, or in none.
    func keepsSubclusters(_ entry: QCOW2.L2Entry) -> Bool {
        hasSubclusters && !entry.isCompressed && (entry.offset == 0 || entry.isCopied)
    }

    /// The guest bytes that are allocated when `range` is written to clusters with these entries.
    func filledRange(
        _ range: Range<Int>, first: QCOW2.L2Entry, last: QCOW2.L2Entry
    ) -> Range<Int> {
        let headUnit = 1 << (keepsSubclusters(first) ? geometry.unitBits : geometry.clusterBits)
        let tailUnit = 1 << (keepsSubclusters(last) ? geometry.unitBits : geometry.clusterBits)
        return range.lowerBound & ~(headUnit - 1)..<(range.upperBound + tailUnit - 1)
            & ~(tailUnit - 1)
    }

    /// Marks a whole subcluster as zeroes.
    ///
    /// - Returns: `false` where it has to be written.
    func zeroSubcluster(_ offset: Int, _ end: Int) async throws(BlockError) -> Bool {
        let unit = 1 << geometry.unitBits
        guard hasSubclusters, offset & (unit - 1) == 0, end - offset == unit else { return false }
        while true {
            let slice = try await writableSlice(at: offset)
            if let other = conflict(offset >> geometry.clusterBits) {
                await other.queue.wait()
                continue
            }
            let index = (offset >> geometry.clusterBits) & (1 << sliceEntryBits - 1)
            var entry = entry(slice, index)
            if entry.isCompressed { return false }
            let bit = UInt64(1) << UInt64((offset >> geometry.unitBits) & 31)
            entry.bitmap = entry.bitmap & ~bit | bit << 32
            setEntry(slice, index, entry)
            l2.markDirty(slice)
            return true
        }
    }

    /// Whether guest `offset` is within a subcluster that has its data where it stays. Others may be
    /// writing to it right now: it must not be copied.
    func hasData(_ entry: QCOW2.L2Entry, after offset: Int) -> Bool {
        hasSubclusters && offset & (1 << geometry.unitBits - 1) != 0 && keepsSubclusters(entry)
            && entry.kind(
                ofSubcluster: (offset >> geometry.unitBits) & 31, hasDataFile: hasDataFile)
                == .normal
    }

    /// The new entry of guest cluster `cluster`, of which the bytes in `filled` are written.
    func filledEntry(
        _ old: QCOW2.L2Entry, at host: Int, _ cluster: Int, filled: Range<Int>
    ) -> QCOW2.L2Entry {
        guard hasSubclusters else { return QCOW2.L2Entry(cluster: host) }
        let start = cluster << geometry.clusterBits
        let part = filled.clamped(to: start..<(start + geometry.clusterSize))
        let first = (part.lowerBound - start) >> geometry.unitBits
        let count = part.count >> geometry.unitBits
        let bits = UInt64((1 << count - 1) << first)
        let kept = keepsSubclusters(old) ? old.bitmap : 0
        return QCOW2.L2Entry(cluster: host, bitmap: kept & ~(bits << 32) | bits)
    }
}
