import BlockCore
import BlockGraph

extension QCOW2Driver {
    // MARK: Zeroes

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try checkWritable()
        if isRawDataFile {
            try await makeDataFileReach(range.end)
            try await data.writeZeroes(range, flags)
            return
        }
        let unmaps = flags.contains(.mayUnmap)
        if !hasZeroFlag, !unmaps || node.backing != nil {
            throw BlockError(.unsupported, "version 2 of qcow2 has no clusters of zeroes")
        }
        let inner = wholeClusters(range)
        guard inner.offset < inner.end else {
            try await zeroPart(range, flags)
            return
        }
        if range.offset < inner.offset {
            try await zeroPart(ByteRange(from: range.offset, to: inner.offset), flags)
        }
        let keepsClusters = !unmaps || options.discardNoUnref
        try await changeEntries(inner, makesTables: node.backing != nil) { old, hasBacking in
            self.zeroed(old, hasBacking: hasBacking, keepsCluster: keepsClusters)
        }
        if inner.end < range.end {
            try await zeroPart(ByteRange(from: inner.end, to: range.end), flags)
        }
        try await commitIfMuchRemoved()
    }

    /// An entry that reads as zeroes, in place of `old`.
    private func zeroed(
        _ old: QCOW2.L2Entry, hasBacking: Bool, keepsCluster: Bool
    ) -> QCOW2.L2Entry {
        let kind = old.kind(hasZeroFlag: hasZeroFlag, hasDataFile: hasDataFile)
        if kind == .unallocated, old.bitmap == 0, !hasBacking { return old }
        if !hasZeroFlag { return .init(rawValue: 0) }
        let keeps = keepsCluster && old.isCopied && (kind == .normal || kind == .zeroAllocated)
        return .zero(keeping: keeps ? old.rawValue : 0, hasSubclusters: hasSubclusters)
    }

    /// The clusters that lie within `range`; the last one of the disk counts up to the disk's end.
    private func wholeClusters(_ range: ByteRange) -> (offset: Int, end: Int) {
        let size = geometry.clusterSize
        let start = (range.offset + size - 1) & ~(size - 1)
        let end =
            range.end == node.size ? (range.end + size - 1) & ~(size - 1) : range.end & ~(size - 1)
        return (start, end)
    }

    /// Zeroes a part of one cluster, or of two neighbours, by writing, unless it is zeroes already.
    private func zeroPart(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        var offset = range.offset
        while offset < range.end {
            let end = min(range.end, offset | (1 << geometry.unitBits - 1) + 1)
            let isZero: Bool
            if let slice = try await slice(at: offset) {
                isZero =
                    conflict(offset >> geometry.clusterBits) == nil && readsAsZeroes(slice, offset)
            } else {
                isZero = !hasBacking(from: offset & ~(1 << geometry.unitBits - 1))
            }
            if !isZero {
                if try await zeroSubcluster(offset, end) {
                    offset = end
                    continue
                }
                if flags.contains(.noFallback) {
                    throw BlockError(.unsupported, "parts of clusters are zeroed by writing")
                }
                let zeroes = try IOVector(allocating: end - offset)
                zeroes.fill(0)
                try await write(offset, from: zeroes, [])
            }
            offset = end
        }
    }

    // MARK: Discard

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try checkWritable()
        if isRawDataFile {
            // A hint, but what is read here and in the raw file must stay the same.
            let end = min(range.end, data.size)
            guard range.offset < end else { return }
            try await data.writeZeroes(ByteRange(from: range.offset, to: end), .mayUnmap)
            return
        }
        if !hasZeroFlag, hasBacking(from: range.offset) {
            throw BlockError(
                .unsupported, "in version 2 of qcow2 a discard would show the backing image's data")
        }
        let inner = wholeClusters(range)
        guard inner.offset < inner.end else { return }
        try await changeEntries(inner, makesTables: node.backing != nil) { old, hasBacking in
            self.zeroed(old, hasBacking: hasBacking, keepsCluster: self.options.discardNoUnref)
        }
        if hasDataFile, options.passDiscardRequest {
            let end = min(inner.end, data.size)
            if inner.offset < end {
                try? await data.discard(ByteRange(from: inner.offset, to: end))
            }
        }
        try await commitIfMuchRemoved()
    }

    // MARK: Entries

    /// Changes the entries of whole clusters.
    ///
    /// - Parameters:
    ///   - range: from a cluster's start to a cluster's end.
    ///   - makesTables: an L2 table is made where there is none and a backing image shows through.
    ///   - change: the new entry for an old one; it is told whether a backing image reaches there.
    func changeEntries(
        _ range: (offset: Int, end: Int), makesTables: Bool,
        _ change: (QCOW2.L2Entry, Bool) -> QCOW2.L2Entry
    ) async throws(BlockError) {
        let bits = geometry.clusterBits
        let coverage = 1 << geometry.l2CoverageBits
        var offset = range.offset
        while offset < range.end {
            let index = offset >> geometry.l2CoverageBits
            if QCOW2.L1Entry(rawValue: image.l1[index]).offset == 0, tablesInCreation[index] == nil,
                !makesTables || !hasBacking(from: offset)
            {
                offset = (offset & ~(coverage - 1)) + coverage
                continue
            }
            let slice = try await writableSlice(at: offset)
            if let other = conflict(offset >> bits) {
                await other.queue.wait()
                continue
            }
            let end = min(range.end, offset | (1 << sliceShift - 1) + 1)
            var isChanged = false
            while offset < end, conflict(offset >> bits) == nil {
                let index = (offset >> bits) & (1 << sliceEntryBits - 1)
                let old = entry(slice, index)
                let new = change(old, hasBacking(from: offset))
                if new != old {
                    replaced(old, by: new, discards: options.passDiscardRequest)
                    setEntry(slice, index, new)
                    isChanged = true
                }
                offset += 1 << bits
            }
            if isChanged { l2.markDirty(slice) }
        }
    }
}
