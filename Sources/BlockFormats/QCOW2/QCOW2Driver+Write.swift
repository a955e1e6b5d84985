import BlockCore
import BlockGraph
import BlockIO

extension QCOW2Driver {
    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        if flags.contains(.compressed) {
            try await writeCompressed(offset, vector)
            return
        }
        // The common case: the clusters are there, one after the other, and are this image's alone.
        if let slice = l2.lookup(offset >> sliceShift) {
            let run = run(slice, offset, vector.count)
            if run.kind == .normal, run.isCopied, run.count == vector.count {
                try await writeInPlace(run, offset, vector)
                return
            }
        }
        try await writeRuns(offset, vector)
    }

    /// Writes run by run, several at once where there is more than one.
    func writeRuns(_ offset: Int, _ vector: IOVector) async throws(BlockError) {
        let lanes = RequestLanes(on: node.seat)
        do throws(BlockError) {
            var done = 0
            while done < vector.count, lanes.failure == nil {
                await lanes.waitForRoom()
                let left = vector.slice(done, vector.count - done)
                done += try await startRun(offset + done, left, lanes)
            }
        } catch {
            // The memory is the caller's again once nothing reads it.
            try? await lanes.finish()
            throw error
        }
        try await lanes.finish()
    }

    private func writeInPlace(
        _ run: Run, _ offset: Int, _ vector: IOVector
    ) async throws(BlockError) {
        try checkWritable()
        try await checkHost(run, offset)
        if !hasDataFile, image.overlap(run.host, run.count) != nil {
            try await image.checkOverlap(run.host, run.count)
        }
        let epoch = epochs.enter()
        defer { epochs.leave(epoch) }
        if !hasDataFile, run.host + run.count > file.size {
            try await image.ensureSize(run.host + run.count)
        }
        await file.reached(.writeAIO)
        try await writeData(run.host, offset, from: vector)
    }

    /// Guest data to `host` in the file, where clusters are.
    @inline(__always)
    func writeData(
        _ host: Int, _ guest: Int, from vector: IOVector
    ) async throws(BlockError) {
        try await makeDataFileReach(host + vector.count)
        if isEncrypted {
            try await writeEncrypted(host, guest, from: vector)
        } else {
            try await data.write(host, from: vector)
        }
    }

    /// Throws once the image was found corrupt.
    @inline(__always)
    func checkWritable() throws(BlockError) {
        if let failure = image.writeFailure { throw failure }
    }

    /// Begins to write the start of `vector`, as much as one run of clusters takes.
    ///
    /// - Returns: the bytes that are on their way; 0 when another request changed the entries meanwhile.
    private func startRun(
        _ offset: Int, _ vector: IOVector, _ lanes: RequestLanes
    ) async throws(BlockError) -> Int {
        let slice = try await writableSlice(at: offset)
        let run = run(slice, offset, vector.count)
        if run.kind == .normal, run.isCopied {
            let part = vector.slice(0, run.count)
            await lanes.start(isLast: run.count == vector.count) { () throws(BlockError) in
                try await self.writeInPlace(run, offset, part)
            }
            return run.count
        }
        let first = offset >> geometry.clusterBits
        if let other = conflict(first) {
            return try await startBeside(other, offset, vector, lanes)
        }
        return try await startNewClusters(slice, run, offset, vector, lanes)
    }

    // MARK: Allocation

    /// Reserves clusters for the start of `vector` and begins to fill them.
    private func startNewClusters(
        _ slice: QCOW2TableCache.Slice, _ run: Run, _ offset: Int, _ vector: IOVector,
        _ lanes: RequestLanes
    ) async throws(BlockError) -> Int {
        let bits = geometry.clusterBits
        let first = offset >> bits
        let old = entry(slice, first & (1 << sliceEntryBits - 1))
        let reuses =
            hasSubclusters
            ? keepsSubclusters(old) && old.offset != 0 : run.kind == .zeroAllocated && run.isCopied
        let limit: Int
        if reuses {
            let end = hasSubclusters ? first + 1 : (offset + run.count - 1) >> bits + 1
            // Whoever fills one of them already has it alone.
            limit = (first + 1..<max(end, first + 1)).first { conflict($0) != nil } ?? end
        } else {
            limit = clustersToAllocate(slice, first, (offset + vector.count - 1) >> bits + 1)
        }
        let allocation = QCOW2Allocation(first..<limit, in: slice)
        allocations.append(allocation)
        let clusters: QCOW2Refcounts.Allocation
        do throws(BlockError) {
            if hasDataFile {
                // Data is where it is in the disk, and nobody counts it.
                clusters = .init(offset: first << bits, count: limit - first, isFresh: false)
            } else if reuses {
                let host = hasSubclusters ? old.offset : run.host
                clusters = .init(
                    offset: host & ~(geometry.clusterSize - 1), count: limit - first,
                    isFresh: false)
                try await image.checkOverlap(clusters.offset, clusters.count << bits)
                // The last cluster of a file is there as far as somebody wrote to it.
                try await image.ensureSize(clusters.offset + clusters.count << bits)
            } else {
                clusters = try await refcounts.allocate(upTo: limit - first)
            }
        } catch {
            end(allocation)
            throw error
        }
        // Where there are fewer in a row, what comes after is somebody else's to take.
        allocation.clusters = first..<(first + clusters.count)
        let count = min(vector.count, (first + clusters.count) << bits - offset)
        let data = vector.slice(0, count)
        await lanes.start(isLast: count == vector.count) { () throws(BlockError) in
            try await self.fill(
                allocation, clusters, offset, data, reuses: reuses || self.hasDataFile)
        }
        return count
    }

    /// Writes to new clusters, and links them.
    private func fill(
        _ allocation: QCOW2Allocation, _ clusters: QCOW2Refcounts.Allocation, _ offset: Int,
        _ data: IOVector, reuses: Bool
    ) async throws(BlockError) {
        defer { end(allocation) }
        do throws(BlockError) {
            try await writeData(allocation, clusters, offset, data)
        } catch {
            if !reuses {
                removeClusters(
                    clusters.offset >> geometry.clusterBits, clusters.count, discards: false)
            }
            throw error
        }
        link(allocation, clusters)
        allocation.isLinked = true
    }

    func end(_ allocation: QCOW2Allocation) {
        allocation.slice.pinCount -= 1
        allocations.removeAll { $0 === allocation }
        allocation.state = .ended
        allocation.queue.wakeAll()
    }

    /// One past the last cluster from `first` on that has to be allocated and nobody else allocates.
    private func clustersToAllocate(
        _ slice: QCOW2TableCache.Slice, _ first: Int, _ limit: Int
    ) -> Int {
        let mask = 1 << sliceEntryBits - 1
        let sliceEnd = first - (first & mask) + mask + 1
        var end = first + 1
        while end < min(limit, sliceEnd) {
            let entry = entry(slice, end & mask)
            let kind = entry.kind(hasZeroFlag: hasZeroFlag, hasDataFile: hasDataFile)
            if entry.isCopied, kind == .normal || kind == .zeroAllocated { break }
            if conflict(end) != nil { break }
            end += 1
        }
        return end
    }

    /// Writes the guest's data to new clusters, with the rest of the first and last cluster around
    /// it, in one request.
    private func writeData(
        _ allocation: QCOW2Allocation, _ clusters: QCOW2Refcounts.Allocation, _ offset: Int,
        _ data: IOVector
    ) async throws(BlockError) {
        let bits = geometry.clusterBits
        let start = (offset >> bits) << bits
        let dataEnd = offset + data.count
        let mask = 1 << sliceEntryBits - 1
        let lastEntry = entry(allocation.slice, ((dataEnd - 1) >> bits) & mask)
        let filled = filledRange(
            offset..<dataEnd, first: entry(allocation.slice, (start >> bits) & mask),
            last: lastEntry)
        let headIsZero = readsAsZeroes(allocation.slice, filled.lowerBound..<offset)
        let tailIsZero = readsAsZeroes(allocation.slice, dataEnd..<filled.upperBound)
        // What was never written reads as zeroes already; but decrypted, as noise.
        let isBlank = clusters.isFresh && !isEncrypted
        let first = isBlank && headIsZero ? offset : filled.lowerBound
        let leavesTail = isBlank && tailIsZero || hasData(lastEntry, after: dataEnd)
        var last = leavesTail ? dataEnd : filled.upperBound
        // A data file is as long as the disk.
        if hasDataFile { last = min(last, max(dataEnd, node.size)) }
        allocation.filled = filled
        allocation.place(
            host: clusters.offset - start, writes: first..<last, data: offset..<dataEnd)
        let head = try await rest(first, offset - first, isZero: headIsZero)
        let tail = try await rest(dataEnd, last - dataEnd, isZero: tailIsZero)
        if head.count + tail.count > 0 { await file.reached(.cowWrite) }
        await file.reached(.writeAIO)
        allocation.takeMerged(head: head, tail: tail)
        var whole = head
        whole.append(data)
        whole.append(tail)
        try await writeData(clusters.offset + first - start, first, from: whole)
    }

    private func rest(
        _ offset: Int, _ count: Int, isZero: Bool
    ) async throws(BlockError) -> IOVector {
        if count == 0 { return IOVector() }
        let vector = try IOVector(allocating: count)
        if isZero {
            vector.fill(0)
        } else {
            await file.reached(.cowRead)
            try await readGuest(offset, into: vector)
        }
        return vector
    }

    /// Whether a part of one cluster is known to read as zeroes.
    func readsAsZeroes(_ slice: QCOW2TableCache.Slice, _ range: Range<Int>) -> Bool {
        var offset = range.lowerBound
        while offset < range.upperBound {
            if !readsAsZeroes(slice, offset) { return false }
            offset = (offset | (1 << geometry.unitBits - 1)) + 1
        }
        return true
    }

    /// Whether the cluster, or subcluster, at guest `offset` is known to read as zeroes.
    func readsAsZeroes(_ slice: QCOW2TableCache.Slice, _ offset: Int) -> Bool {
        switch kind(slice, offset) {
        case .zeroPlain, .zeroAllocated: return true
        case .unallocated: return !hasBacking(from: offset & ~(1 << geometry.unitBits - 1))
        case .normal, .compressed: return false
        }
    }

    /// The state of the cluster, or subcluster, at guest `offset`.
    func kind(_ slice: QCOW2TableCache.Slice, _ offset: Int) -> QCOW2.L2Entry.Kind {
        let entry = entry(slice, (offset >> geometry.clusterBits) & (1 << sliceEntryBits - 1))
        return hasSubclusters
            ? entry.kind(
                ofSubcluster: (offset >> geometry.unitBits) & 31, hasDataFile: hasDataFile)
            : entry.kind(hasZeroFlag: hasZeroFlag, hasDataFile: hasDataFile)
    }

    /// Whether there is a backing image that reaches past guest `offset`.
    func hasBacking(from offset: Int) -> Bool {
        guard let backing = node.backing else { return false }
        return offset < backing.size
    }

    /// The entries of guest clusters name their new clusters from here on.
    private func link(
        _ allocation: QCOW2Allocation, _ clusters: QCOW2Refcounts.Allocation
    ) {
        let mask = 1 << sliceEntryBits - 1
        let slice = allocation.slice
        for step in 0..<clusters.count {
            let cluster = allocation.clusters.lowerBound + step
            let old = entry(slice, cluster & mask)
            let new = filledEntry(
                old, at: clusters.offset + step << geometry.clusterBits, cluster,
                filled: allocation.filled)
            replaced(old, by: new, discards: options.passDiscardOther)
            setEntry(slice, cluster & mask, new)
        }
        l2.markDirty(slice)
        hasNewLinks = true
    }

    // MARK: Removal

    /// Notes what `old` referred to and `new` does not, to be given back once that is durable.
    func replaced(_ old: QCOW2.L2Entry, by new: QCOW2.L2Entry, discards: Bool) {
        // In a data file nobody counts clusters.
        if hasDataFile { return }
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
        let queue = WaitQueue()
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
                    await file.reached(.l2AllocCowRead)
                    // Nothing in memory is newer: a shared table is never changed.
                    try await readFile(old.offset, into: content)
                }
                await file.reached(.l2AllocWrite)
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
                slice.host = cluster.offset + (slice.key - firstKey) * l2.sliceBytes
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
