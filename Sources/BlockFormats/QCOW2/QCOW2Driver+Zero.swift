import BlockCore
import BlockGraph

// Zeroes that somebody wrote are in the tables, also where nothing is below that could be seen: the backing
// image may be left out just now (`"backing": null`), may grow, and may be named later. A discard says
// nothing about what is read afterwards, and leaves alone what reads as zeroes.

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
        // Unallocated stands for zeroes in version 2, as long as no backing image ever shows.
        if !hasZeroFlag, !unmaps || node.backing != nil || !image.header.backingName.isEmpty {
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
        try await changeEntries(inner, whereNone: hasZeroFlag ? .make : .skip) { old, _ in
            self.zeroed(old, keepsCluster: keepsClusters)
        }
        if inner.end < range.end {
            try await zeroPart(ByteRange(from: inner.end, to: range.end), flags)
        }
        try await commitIfMuchRemoved()
    }

    /// An entry that reads as zeroes, in place of `old`.
    private func zeroed(_ old: QCOW2.L2Entry, keepsCluster: Bool) -> QCOW2.L2Entry {
        let kind = old.kind(hasZeroFlag: hasZeroFlag, hasDataFile: hasDataFile)
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
            if try await !zeroUnit(offset, end) {
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

    /// Zeroes a part of a cluster, or of a subcluster, without writing.
    ///
    /// - Returns: `false` where it has to be written.
    private func zeroUnit(_ offset: Int, _ end: Int) async throws(BlockError) -> Bool {
        switch try await zeroness(at: offset) {
        case .explicit: return true
        case .unallocated:
            // Without the zero flag this is all that there is to zeroes.
            if !hasZeroFlag { return true }
            if try await markUnallocatedZero(offset) { return true }
        case .none: break
        }
        return try await zeroSubcluster(offset, end)
    }

    private enum Zeroness {
        /// The tables say so.
        case explicit
        /// There is nothing, here or below.
        case unallocated
        case none
    }

    /// How the cluster, or subcluster, at guest `offset` reads as zeroes, when nobody fills it right now.
    private func zeroness(at offset: Int) async throws(BlockError) -> Zeroness {
        guard let slice = try await slice(at: offset) else {
            return hasBacking(from: offset & ~(1 << geometry.unitBits - 1)) ? .none : .unallocated
        }
        guard conflict(offset >> geometry.clusterBits) == nil else { return .none }
        return zeroness(slice, offset)
    }

    private func zeroness(_ slice: QCOW2TableCache.Slice, _ offset: Int) -> Zeroness {
        guard readsAsZeroes(slice, offset) else { return .none }
        switch kind(slice, offset) {
        case .zeroPlain, .zeroAllocated: return .explicit
        case .unallocated, .normal, .compressed: return .unallocated
        }
    }

    /// Marks the whole cluster, or subcluster, at guest `offset` as zeroes where it reads as such because there is
    /// nothing.
    ///
    /// - Returns: `false` where somebody has filled it meanwhile.
    private func markUnallocatedZero(_ offset: Int) async throws(BlockError) -> Bool {
        while true {
            let slice = try await writableSlice(at: offset)
            if let other = conflict(offset >> geometry.clusterBits) {
                await other.queue.wait()
                continue
            }
            switch zeroness(slice, offset) {
            case .explicit: return true
            case .none: return false
            case .unallocated: break
            }
            let index = (offset >> geometry.clusterBits) & (1 << sliceEntryBits - 1)
            var new = QCOW2.L2Entry.zero(hasSubclusters: false)
            if hasSubclusters {
                new = entry(slice, index)
                let bit = UInt64(1) << UInt64((offset >> geometry.unitBits) & 31)
                new.bitmap = new.bitmap & ~bit | bit << 32
            }
            setEntry(slice, index, new)
            l2.markDirty(slice)
            return true
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
        try await changeEntries(inner, whereNone: .makeOverBacking) { old, hasBacking in
            let kind = old.kind(hasZeroFlag: self.hasZeroFlag, hasDataFile: self.hasDataFile)
            if kind == .unallocated, old.bitmap == 0, !hasBacking { return old }
            return self.zeroed(old, keepsCluster: self.options.discardNoUnref)
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

    /// What is done where there is no L2 table.
    enum MissingTables {
        case skip
        /// A table is made where a backing image shows through.
        case makeOverBacking
        case make
    }

    /// How many slices are changed before others on the thread have their turn.
    private static let slicesPerTurn = 16

    /// Changes the entries of whole clusters.
    ///
    /// - Parameters:
    ///   - range: from a cluster's start to a cluster's end.
    ///   - change: the new entry for an old one; it is told whether a backing image reaches there.
    func changeEntries(
        _ range: (offset: Int, end: Int), whereNone: MissingTables,
        _ change: (QCOW2.L2Entry, Bool) -> QCOW2.L2Entry
    ) async throws(BlockError) {
        let bits = geometry.clusterBits
        let coverage = 1 << geometry.l2CoverageBits
        var offset = range.offset
        var sliceCount = 0
        while offset < range.end {
            let index = offset >> geometry.l2CoverageBits
            if QCOW2.L1Entry(rawValue: image.l1[index]).offset == 0, tablesInCreation[index] == nil,
                whereNone == .skip || whereNone == .makeOverBacking && !hasBacking(from: offset)
            {
                offset = (offset & ~(coverage - 1)) + coverage
                continue
            }
            // Of a large disk there are many, and all may be in memory. Nothing is held from one to the next.
            sliceCount += 1
            if sliceCount.isMultiple(of: Self.slicesPerTurn) { await thread.yield() }
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
