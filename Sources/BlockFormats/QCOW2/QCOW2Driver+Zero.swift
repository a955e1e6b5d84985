import BlockCore
import BlockGraph

extension QCOW2Driver {
    // MARK: Zeroes

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try checkWritable()
        if isRawDataFile {
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
            try await data.writeZeroes(range, .mayUnmap)
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

    // MARK: Status

    public func blockStatus(
        _ range: ByteRange, precise: Bool
    ) async throws(BlockError) -> BlockStatus {
        try await blockStatus(range, of: self)
    }

    /// What the tables of `view` say.
    func blockStatus(
        _ range: ByteRange, of view: some QCOW2TableView
    ) async throws(BlockError) -> BlockStatus {
        var total: Run?
        var offset = range.offset
        var slicesLeft = Self.statusSliceCountMax
        while offset < range.end, slicesLeft > 0 {
            let next = try await run(at: offset, limit: range.end - offset, of: view)
            slicesLeft -= 1
            guard var whole = total else {
                total = next
                offset += next.count
                continue
            }
            let follows: Bool
            switch whole.kind {
            case .normal, .zeroAllocated:
                follows = next.kind == whole.kind && next.host == whole.host + whole.count
            case .unallocated, .zeroPlain, .compressed:
                follows = next.kind == whole.kind
            }
            if !follows { break }
            whole.count += next.count
            total = whole
            offset += next.count
        }
        guard let total else { return BlockStatus([], count: range.count) }
        return status(of: total)
    }

    /// Whether the image looks as if clusters were reserved before they were written: far more of them
    /// are in use than the file has storage for. Where data lies in such an image its file knows better.
    ///
    /// - Parameter storedBytes: what the file takes on its file system.
    public func isPreallocated(storedBytes: Int) async throws(BlockError) -> Bool {
        let stored = storedBytes >> geometry.clusterBits
        // A tenth more, or two clusters, are the file system's way of counting.
        let threshold = max(stored + stored / 9, stored + 2)
        let count = geometry.clusterCount(for: file.size)
        // Images that are only read do not have their refcounts in memory.
        let entries = min(
            image.header.refcountTableClusters << (geometry.clusterBits - 3),
            QCOW2.Limit.refcountTableBytesMax / 8,
            count >> geometry.refcountBlockBits + 1)
        let table = try await Self.readTable(file, image.header.refcountTableOffset, entries)
        var used = 0
        for (index, entry) in table.enumerated() where entry != 0 && used < threshold {
            let left = count - index << geometry.refcountBlockBits
            used += try await clustersInUse(block: entry, of: left)
        }
        return used >= threshold
    }

    /// How many of the first `count` clusters that a refcount block counts are in use.
    private func clustersInUse(block: UInt64, of count: Int) async throws(BlockError) -> Int {
        guard block < UInt64(file.size), Int(block).isAligned(to: geometry.clusterSize) else {
            return 0
        }
        let vector = try IOVector(allocating: geometry.clusterSize)
        let there = min(vector.count, file.size - Int(block))
        vector.zero(there, vector.count - there)
        try await file.read(Int(block), into: vector.slice(0, there))
        guard let bytes = vector.single?.bytes else { return 0 }
        let counts = UnsafeRawBufferPointer(bytes)
        var used = 0
        for cluster in 0..<max(0, min(count, geometry.clustersPerRefcountBlock)) {
            if QCOW2.Refcount.get(counts, cluster, order: geometry.refcountOrder) != 0 { used += 1 }
        }
        return used
    }

    /// Slices that one question about status looks at.
    static let statusSliceCountMax = 256

    private func status(of run: Run) -> BlockStatus {
        switch run.kind {
        case .unallocated:
            return BlockStatus([], count: run.count)
        case .normal where isEncrypted:
            // What the file holds is not what is read.
            return BlockStatus([.data, .allocated], count: run.count)
        case .normal:
            return BlockStatus(
                [.data, .allocated], count: run.count,
                mapping: .init(node: data.node, offset: run.host), asksChild: true)
        case .compressed:
            return BlockStatus([.data, .allocated, .compressed], count: run.count)
        case .zeroPlain:
            return BlockStatus([.zero, .allocated], count: run.count)
        case .zeroAllocated:
            return BlockStatus(
                [.zero, .allocated], count: run.count,
                mapping: isEncrypted ? nil : .init(node: data.node, offset: run.host))
        }
    }
}
