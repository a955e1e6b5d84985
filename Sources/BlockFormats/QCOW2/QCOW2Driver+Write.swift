import BlockCore
import BlockGraph

extension QCOW2Driver {
    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        // The common case: the clusters are there, one after the other, and are this image's alone.
        if let slice = l2.lookup(offset >> sliceShift) {
            let run = run(slice, offset, vector.count)
            if run.kind == .normal, run.isCopied, run.count == vector.count {
                try await writeInPlace(run, offset, vector)
                return
            }
        }
        var done = 0
        while done < vector.count {
            let left = vector.slice(done, vector.count - done)
            done += try await writeRun(offset + done, left)
        }
    }

    private func writeInPlace(
        _ run: Run, _ offset: Int, _ vector: IOVector
    ) async throws(BlockError) {
        try checkWritable()
        try await checkHost(run, offset)
        if image.overlap(run.host, run.count) != nil {
            try await image.checkOverlap(run.host, run.count)
        }
        let epoch = epochs.enter()
        defer { epochs.leave(epoch) }
        if run.host + run.count > file.size { try await image.ensureSize(run.host + run.count) }
        try await file.write(run.host, from: vector)
    }

    /// Throws once the image was found corrupt.
    @inline(__always)
    func checkWritable() throws(BlockError) {
        if let failure = image.writeFailure { throw failure }
    }

    /// Writes the start of `vector`, as much as one run of clusters takes.
    ///
    /// - Returns: the bytes written; 0 when another request changed the entries meanwhile.
    private func writeRun(_ offset: Int, _ vector: IOVector) async throws(BlockError) -> Int {
        let slice = try await writableSlice(at: offset)
        let run = run(slice, offset, vector.count)
        if run.kind == .normal, run.isCopied {
            try await writeInPlace(run, offset, vector.slice(0, run.count))
            return run.count
        }
        let first = offset >> geometry.clusterBits
        if let other = conflict(first) {
            await other.queue.wait()
            return 0
        }
        return try await writeNewClusters(slice, run, offset, vector)
    }

    /// The request that is about to change the entry of a guest cluster.
    func conflict(_ cluster: Int) -> Allocation? {
        if allocations.isEmpty { return nil }
        return allocations.first { $0.clusters.contains(cluster) }
    }

    // MARK: Allocation

    private func writeNewClusters(
        _ slice: QCOW2TableCache.Slice, _ run: Run, _ offset: Int, _ vector: IOVector
    ) async throws(BlockError) -> Int {
        let bits = geometry.clusterBits
        let first = offset >> bits
        let reuses = run.kind == .zeroAllocated && run.isCopied
        let limit =
            reuses
            ? (offset + run.count - 1) >> bits + 1
            : clustersToAllocate(slice, first, (offset + vector.count - 1) >> bits + 1)
        let allocation = Allocation(first..<limit)
        allocations.append(allocation)
        slice.pinCount += 1
        defer {
            slice.pinCount -= 1
            allocations.removeAll { $0 === allocation }
            allocation.queue.wakeAll()
        }
        let clusters: QCOW2Refcounts.Allocation
        if reuses {
            clusters = .init(
                offset: run.host & ~(geometry.clusterSize - 1), count: limit - first, isFresh: false
            )
            try await image.checkOverlap(clusters.offset, clusters.count << bits)
        } else {
            clusters = try await refcounts.allocate(upTo: limit - first)
            if clusters.count < limit - first {
                // Fewer in a row: what comes after is somebody else's to take.
                allocation.clusters = first..<(first + clusters.count)
                allocation.queue.wakeAll()
            }
        }
        let count = min(vector.count, (first + clusters.count) << bits - offset)
        do throws(BlockError) {
            try await writeData(clusters, slice, offset, vector.slice(0, count))
        } catch {
            if !reuses { removeClusters(clusters.offset >> bits, clusters.count, discards: false) }
            throw error
        }
        link(slice, first, clusters)
        return count
    }

    /// One past the last cluster from `first` on that has to be allocated and nobody else allocates.
    private func clustersToAllocate(
        _ slice: QCOW2TableCache.Slice, _ first: Int, _ limit: Int
    ) -> Int {
        let mask = 1 << sliceEntryBits - 1
        let sliceEnd = first - (first & mask) + mask + 1
        var end = first + 1
        while end < min(limit, sliceEnd) {
            let entry = QCOW2.L2Entry(rawValue: slice[end & mask])
            let kind = entry.kind(hasZeroFlag: hasZeroFlag)
            if entry.isCopied, kind == .normal || kind == .zeroAllocated { break }
            if conflict(end) != nil { break }
            end += 1
        }
        return end
    }

    /// Writes the guest's data to new clusters, with the rest of the first and last cluster around
    /// it, in one request.
    private func writeData(
        _ clusters: QCOW2Refcounts.Allocation, _ slice: QCOW2TableCache.Slice, _ offset: Int,
        _ data: IOVector
    ) async throws(BlockError) {
        let bits = geometry.clusterBits
        let start = (offset >> bits) << bits
        let end = start + clusters.count << bits
        let dataEnd = offset + data.count
        var target = clusters.offset
        var whole = IOVector()
        if offset > start {
            let isZero = readsAsZeroes(slice, start)
            if clusters.isFresh, isZero {
                target += offset - start
            } else {
                whole.append(try await rest(start, offset - start, isZero: isZero))
            }
        }
        whole.append(data)
        if dataEnd < end {
            let isZero = readsAsZeroes(slice, dataEnd)
            if !clusters.isFresh || !isZero {
                whole.append(try await rest(dataEnd, end - dataEnd, isZero: isZero))
            }
        }
        try await file.write(target, from: whole)
    }

    private func rest(
        _ offset: Int, _ count: Int, isZero: Bool
    ) async throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: count)
        if isZero { vector.fill(0) } else { try await readGuest(offset, into: vector) }
        return vector
    }

    /// Whether the cluster at guest `offset` is known to read as zeroes.
    func readsAsZeroes(_ slice: QCOW2TableCache.Slice, _ offset: Int) -> Bool {
        let index = (offset >> geometry.clusterBits) & (1 << sliceEntryBits - 1)
        switch QCOW2.L2Entry(rawValue: slice[index]).kind(hasZeroFlag: hasZeroFlag) {
        case .zeroPlain, .zeroAllocated: return true
        case .unallocated: return !hasBacking(from: offset & ~(geometry.clusterSize - 1))
        case .normal, .compressed: return false
        }
    }

    /// Whether there is a backing image that reaches past guest `offset`.
    func hasBacking(from offset: Int) -> Bool {
        guard let backing = node.backing else { return false }
        return offset < backing.size
    }

    /// The entries of guest clusters name their new clusters from here on.
    private func link(
        _ slice: QCOW2TableCache.Slice, _ first: Int, _ clusters: QCOW2Refcounts.Allocation
    ) {
        let mask = 1 << sliceEntryBits - 1
        for step in 0..<clusters.count {
            let index = (first + step) & mask
            let old = QCOW2.L2Entry(rawValue: slice[index])
            let new = QCOW2.L2Entry(cluster: clusters.offset + step << geometry.clusterBits)
            replaced(old, by: new, discards: options.passDiscardOther)
            slice[index] = new.rawValue
        }
        l2.markDirty(slice)
        hasNewLinks = true
    }

    // MARK: Removal

    /// Notes what `old` referred to and `new` does not, to be given back once that is durable.
    func replaced(_ old: QCOW2.L2Entry, by new: QCOW2.L2Entry, discards: Bool) {
        let bits = geometry.clusterBits
        switch old.kind(hasZeroFlag: hasZeroFlag) {
        case .unallocated, .zeroPlain: return
        case .normal, .zeroAllocated:
            if !new.isCompressed, new.offset == old.offset { return }
            removeClusters(old.offset >> bits, 1, discards: discards)
        case .compressed:
            let place = QCOW2.CompressedDescriptor(old, clusterBits: bits)
            let last = (place.offset + place.byteCount - 1) >> bits
            removeClusters(
                place.offset >> bits, last - place.offset >> bits + 1, discards: discards)
            decompressed.removeAll()
        }
    }

    func removeClusters(_ first: Int, _ count: Int, discards: Bool) {
        removedClusterCount += count
        if let last = removed.last, last.first + last.count == first, last.discards == discards {
            removed[removed.count - 1].count += count
        } else {
            removed.append(Removal(first: first, count: count, discards: discards))
        }
    }

    // MARK: L2 tables

    /// The slice that maps guest `offset`, of a table that may be changed; makes the table.
    func writableSlice(at offset: Int) async throws(BlockError) -> QCOW2TableCache.Slice {
        let index = offset >> geometry.l2CoverageBits
        while true {
            try checkWritable()
            guard index < image.l1.count else {
                throw BlockError(.corrupt, "the L1 table is too short for guest offset \(offset)")
            }
            let entry = QCOW2.L1Entry(rawValue: image.l1[index])
            if entry.isCopied, entry.offset != 0 {
                if let slice = try await slice(at: offset) { return slice }
            } else if let queue = tablesInCreation[index] {
                await queue.wait()
            } else {
                try await makeTable(index, old: entry)
            }
        }
    }

    /// Gives the image an L2 table of its own: empty, or a copy of one that is shared.
    private func makeTable(_ index: Int, old: QCOW2.L1Entry) async throws(BlockError) {
        let queue = QCOW2WaitQueue()
        tablesInCreation[index] = queue
        defer {
            tablesInCreation[index] = nil
            queue.wakeAll()
        }
        let bits = geometry.clusterBits
        let cluster = try await refcounts.allocate(upTo: 1)
        do throws(BlockError) {
            if old.offset != 0 || !cluster.isFresh {
                let content = try IOVector(allocating: geometry.clusterSize)
                if old.offset == 0 {
                    content.fill(0)
                } else {
                    // Nothing in memory is newer: a shared table is never changed.
                    try await readFile(old.offset, into: content)
                }
                try await file.write(cluster.offset, from: content)
            }
        } catch {
            removeClusters(cluster.offset >> bits, 1, discards: false)
            throw error
        }
        let firstKey = index << (geometry.l2Bits - sliceEntryBits)
        let keys = firstKey..<(firstKey + 1 << (geometry.l2Bits - sliceEntryBits))
        if old.offset != 0 {
            for slice in l2.cached(in: keys) {
                slice.host = cluster.offset + (slice.key - firstKey) << (sliceEntryBits + 3)
            }
            image.removeTable(at: old.offset)
            removeClusters(old.offset >> bits, 1, discards: options.passDiscardOther)
        }
        image.l1[index] = QCOW2.L1Entry(table: cluster.offset).rawValue
        image.addTable(at: cluster.offset)
        dirtyL1Sectors.insert(index >> 6)
        hasNewLinks = true
    }
}
