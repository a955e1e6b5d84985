import BlockCore
import BlockGraph

/// Growing and shrinking, in orders that leave a whole image at each moment.
extension QCOW2Driver {
    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        try checkWritable()
        try Self.checkSize(size)
        guard size <= geometry.sizeMax else {
            throw BlockError(
                .invalidArgument,
                "a disk of \(SizeText.format(size)) is too large for clusters of "
                    + "\(geometry.clusterSize) bytes")
        }
        let old = node.size
        if size != old { try await prepareResize() }
        if size < old {
            guard preallocation == .off else {
                throw BlockError(.invalidArgument, "preallocation is for growing only")
            }
            try await shrink(from: old, to: size)
        } else if size > old {
            try await grow(from: old, to: size, preallocation)
        }
    }

    /// A disk has whole sectors: other readers would round its size, each in another way.
    static func checkSize(_ size: Int) throws(BlockError) {
        guard size.isAligned(to: 512) else {
            throw BlockError(
                .invalidArgument, "the size of a qcow2 disk is a multiple of 512, not \(size)")
        }
    }

    // MARK: Grow

    private func grow(
        from old: Int, to size: Int, _ preallocation: Preallocation
    ) async throws(BlockError) {
        let entries = geometry.l1EntryCount(for: size)
        if entries > image.l1.count { try await growL1(to: entries) }
        // What a backing image or a stale cluster has there must not show.
        node.size = size
        do throws(BlockError) {
            let dataEnd = hasDataFile ? data.size : 0
            try await growDataFile(to: size, preallocation)
            try await dropVMState(from: old, to: size)
            if isRawDataFile {
                // The raw file is the disk: whatever it has there, the tables name it.
                try await mapDataFile(from: old, to: size)
            } else {
                try await hide(from: old, to: size)
                if preallocation != .off {
                    // Of a data file that is longer than its disk.
                    if dataEnd > old {
                        try await data.writeZeroes(ByteRange(from: old, to: min(dataEnd, size)))
                    }
                    try await preallocate(from: old, to: size, preallocation)
                }
            }
            try await commit()
            image.header.size = size
            try await image.writeHeader()
            try await file.flush()
        } catch {
            node.size = old
            image.header.size = old
            throw error
        }
    }

    /// Drops what lies past the disk's end where the disk is to be: the state of a virtual machine,
    /// which came with a snapshot that was applied.
    private func dropVMState(from old: Int, to size: Int) async throws(BlockError) {
        let mask = geometry.clusterSize - 1
        guard let end = size.adding(mask) else { return }
        try await changeEntries(((old + mask) & ~mask, end & ~mask), whereNone: .skip) { _, _ in
            .init(rawValue: 0)
        }
    }

    /// Zeroes `[old, size)` where something else would be read.
    private func hide(from old: Int, to size: Int) async throws(BlockError) {
        let clusterEnd = min(size, (old + geometry.clusterSize - 1) & ~(geometry.clusterSize - 1))
        if old < clusterEnd, try await !isHidden(old..<clusterEnd) {
            let zeroes = try IOVector(allocating: clusterEnd - old)
            zeroes.fill(0)
            try await write(old, from: zeroes, [])
        }
        guard let backing = node.backing, backing.size > clusterEnd, clusterEnd < size else {
            return
        }
        let range = ByteRange(from: clusterEnd, to: min(size, backing.size))
        if hasZeroFlag {
            // Whole clusters: what follows the backing image's end is new too.
            try await changeEntries(
                (
                    range.offset,
                    (range.end + geometry.clusterSize - 1) & ~(geometry.clusterSize - 1)
                ),
                whereNone: .make
            ) { _, _ in .zero(hasSubclusters: self.hasSubclusters) }
        } else {
            let zeroes = try IOVector(allocating: min(range.count, 1 << 20))
            zeroes.fill(0)
            var offset = range.offset
            while offset < range.end {
                let count = min(zeroes.count, range.end - offset)
                try await write(offset, from: zeroes.slice(0, count), [])
                offset += count
            }
        }
    }

    /// Whether a part of one cluster, past the disk's old end, reads as zeroes already.
    private func isHidden(_ range: Range<Int>) async throws(BlockError) -> Bool {
        guard let slice = try await slice(at: range.lowerBound) else {
            return !hasBacking(from: range.lowerBound)
        }
        return readsAsZeroes(slice, range)
    }

    /// Moves the L1 table to where it has room.
    func growL1(to entries: Int) async throws(BlockError) {
        try await requireUsedL1()
        let bits = geometry.clusterBits
        // As many as its clusters hold.
        let clusters = geometry.clusterCount(for: entries * 8)
        await file.reached(.l1GrowAllocTable)
        let place = try await refcounts.allocate(exactly: clusters)
        var table = image.l1
        table.append(contentsOf: [UInt64](repeating: 0, count: entries - table.count))
        let padding = (clusters << (bits - 3)) - entries
        let bytes = QCOW2Refcounts.bigEndian(
            (table + [UInt64](repeating: 0, count: padding))[...])
        // On disk the new table names only what the old one did and what is durable.
        try await commit()
        await file.reached(.l1GrowWriteTable)
        try await file.write(place.offset, from: try QCOW2Image.vector(bytes))
        try await refcounts.writeBlocks()
        try await file.flush()
        await file.reached(.l1GrowActivateTable)
        let old = (image.header.l1Offset, geometry.clusterCount(for: image.l1.count * 8))
        image.header.l1Offset = place.offset
        image.header.l1EntryCount = entries
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            throw await image.corruption("a larger L1 table could not be put in place")
        }
        image.l1 = table
        try await refcounts.release(old.0 >> bits, old.1)
    }

    /// Gives every cluster of `[old, size)` a place.
    private func preallocate(
        from old: Int, to size: Int, _ preallocation: Preallocation
    ) async throws(BlockError) {
        guard !isEncrypted || hasZeroFlag else {
            throw BlockError(
                .unsupported, "version 2 of qcow2 cannot preallocate clusters of encrypted images")
        }
        if hasDataFile {
            try await mapDataFile(from: old, to: size)
            return
        }
        let bits = geometry.clusterBits
        var cluster = (old + geometry.clusterSize - 1) >> bits
        let end = (size + geometry.clusterSize - 1) >> bits
        while cluster < end {
            let slice = try await writableSlice(at: cluster << bits)
            let mask = 1 << sliceEntryBits - 1
            let wanted = min(end - cluster, mask + 1 - cluster & mask)
            slice.pinCount += 1
            defer { slice.pinCount -= 1 }
            let place = try await refcounts.allocate(upTo: wanted)
            let range = ByteRange(place.offset, place.count << bits)
            // Clusters that were used before hold old data; so do those that are to be written.
            if !place.isFresh || preallocation != .metadata {
                try await file.writeZeroes(range)
            }
            for step in 0..<place.count {
                let index = (cluster + step) & mask
                let new = reservedEntry(place.offset + step << bits)
                replaced(entry(slice, index), by: new, discards: false)
                setEntry(slice, index, new)
            }
            l2.markDirty(slice)
            hasNewLinks = true
            cluster += place.count
        }
    }

    /// The entry of a cluster that has its place in a file of zeroes, and was not written yet.
    private func reservedEntry(_ offset: Int) -> QCOW2.L2Entry {
        let entry = wholeEntry(offset)
        // Zeroes in the file would be decrypted to noise.
        return isEncrypted
            ? .zero(keeping: entry.rawValue, hasSubclusters: hasSubclusters) : entry
    }

    /// Gives every cluster of `[old, size)` the place that it has in the data file.
    private func mapDataFile(from old: Int, to size: Int) async throws(BlockError) {
        let bits = geometry.clusterBits
        let mask = geometry.clusterSize - 1
        let inSlice = 1 << sliceEntryBits - 1
        var cluster = (isRawDataFile ? old : old + mask) >> bits
        let end = (size + mask) >> bits
        while cluster < end {
            let slice = try await writableSlice(at: cluster << bits)
            let sliceEnd = min(end, cluster - cluster & inSlice + inSlice + 1)
            for number in cluster..<sliceEnd {
                setEntry(slice, number & inSlice, reservedEntry(number << bits))
            }
            l2.markDirty(slice)
            hasNewLinks = true
            cluster = sliceEnd
        }
    }

    // MARK: Shrink

    private func shrink(from old: Int, to size: Int) async throws(BlockError) {
        let mask = geometry.clusterSize - 1
        let start = (size + mask) & ~mask
        let end = (old + mask) & ~mask
        // The smaller size first: were it the other way round, a crash would leave holes in the disk.
        image.header.size = size
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            image.header.size = old
            throw error
        }
        node.size = size
        if start < end {
            try await changeEntries((start, end), whereNone: .skip) { _, _ in
                .init(rawValue: 0)
            }
        }
        try await commit()
        try await shrinkDataFile(to: size)
    }

    private func shrinkDataFile(to size: Int) async throws(BlockError) {
        guard hasDataFile, data.size > size else { return }
        do throws(BlockError) {
            try await data.resize(to: size)
        } catch  where !isRawDataFile {
            // A device, say. Nobody reads what it has there.
        }
    }
}
