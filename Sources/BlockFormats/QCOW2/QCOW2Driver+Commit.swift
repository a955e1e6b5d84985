import BlockCore
import BlockGraph
import BlockIO

// Writing metadata out, in the order that the driver's invariants ask for.

extension QCOW2Driver {
    /// What one commit carries to disk: the state of dirty tables when it began.
    private struct Changes {
        var slices: [(slice: QCOW2TableCache.Slice, copy: IOSlice)] = []
        var l1Sectors: [(number: Int, memory: IOSlice)] = []
        var hasLinks = false
        var isEmpty: Bool { slices.isEmpty && l1Sectors.isEmpty }
    }

    /// Removed clusters that wait for a commit are freed when they come to this many bytes.
    static let removedBytesMax = 16 << 20

    private var usesLazyRefcounts: Bool {
        options.lazyRefcounts ?? image.header.compatible.contains(.lazyRefcounts)
            && image.header.version == 3
    }

    public func flush() async throws(BlockError) {
        let refcountsAreDirty = refcounts.isDirty && !usesLazyRefcounts
        if l2.dirty.isEmpty, dirtyL1Sectors.isEmpty, removed.isEmpty, frozen.isEmpty,
            commitRunning == nil, !refcountsAreDirty
        {
            if hasDataFile { try await data.flush() }
            try await file.flush()
            return
        }
        try checkWritable()
        try await commit()
    }

    /// Makes all that completed before durable. Joins a commit that begins after the call.
    func commit() async throws(BlockError) {
        let ticket = commitStarted + 1
        while let running = commitRunning {
            await running.wait()
            if commitSucceeded >= ticket { return }
        }
        let queue = WaitQueue()
        commitRunning = queue
        commitStarted += 1
        let number = commitStarted
        defer {
            commitRunning = nil
            queue.wakeAll()
        }
        try checkWritable()
        try await releaseFrozen()
        freeze()
        try await writeOut()
        commitSucceeded = number
        frozenIsDurable = !frozen.isEmpty
        try await releaseFrozen()
    }

    /// Commits when much space waits to be given back.
    func commitIfMuchRemoved() async throws(BlockError) {
        if removedClusterCount << geometry.clusterBits >= Self.removedBytesMax {
            try await commit()
        }
    }

    private func freeze() {
        guard frozen.isEmpty, !removed.isEmpty, epochs.olderIsEmpty else { return }
        frozen = removed
        removed = []
        removedClusterCount = 0
        frozenIsDurable = false
        epochs.turn()
    }

    private func writeOut() async throws(BlockError) {
        var changes = Changes()
        do throws(BlockError) {
            try take(&changes)
            if hasDataFile { try await data.flush() }
            if !changes.isEmpty {
                if changes.hasLinks { try await makeLinkable() }
                try await write(changes)
            }
            if !usesLazyRefcounts { try await refcounts.writeBlocks() }
            try await file.flush()
        } catch {
            putBack(changes)
            throw error
        }
        for (slice, _) in changes.slices { slice.isWriting = false }
    }

    /// Steps 2 and 3: counts, data and tables that links are about to name.
    private func makeLinkable() async throws(BlockError) {
        if usesLazyRefcounts {
            if !image.header.incompatible.contains(.dirty) {
                image.header.incompatible.insert(.dirty)
                do throws(BlockError) {
                    try await image.writeHeader()
                } catch {
                    // Or the next attempt would take it for written.
                    image.header.incompatible.remove(.dirty)
                    throw error
                }
            }
        } else {
            try await refcounts.writeBlocks()
        }
        try await file.flush()
    }

    /// Takes dirty tables over, as copies: the tables go on changing.
    private func take(_ changes: inout Changes) throws(BlockError) {
        changes.hasLinks = hasNewLinks
        hasNewLinks = false
        var failure: BlockError?
        for slice in l2.takeDirty() {
            do throws(BlockError) {
                let copy = try l2.copy(slice)
                slice.isWriting = true
                changes.slices.append((slice, copy))
            } catch {
                l2.markDirty(slice)
                failure = error
            }
        }
        let sectors = dirtyL1Sectors
        dirtyL1Sectors = []
        for sector in sectors {
            let range = sector << 6..<min((sector + 1) << 6, image.l1.count)
            do throws(BlockError) {
                let bytes = QCOW2Refcounts.bigEndian(image.l1[range])
                let memory = try IOBuffer(count: bytes.count).prefix(bytes.count)
                memory.bytes.copyBytes(from: bytes)
                changes.l1Sectors.append((sector, memory))
            } catch {
                dirtyL1Sectors.insert(sector)
                failure = error
            }
        }
        if let failure { throw failure }
    }

    private func putBack(_ changes: Changes) {
        if changes.hasLinks { hasNewLinks = true }
        for (slice, _) in changes.slices {
            slice.isWriting = false
            l2.markDirty(slice)
        }
        for (sector, _) in changes.l1Sectors { dirtyL1Sectors.insert(sector) }
    }

    private func write(_ changes: Changes) async throws(BlockError) {
        let tables = changes.slices.map { (host: $0.slice.host, memory: $0.copy) }
        let l1 = changes.l1Sectors.map {
            (host: image.header.l1Offset + $0.number << 9, memory: $0.memory)
        }
        for table in tables {
            try await image.checkOverlap(
                table.host, table.memory.count, ignoring: .activeL2, "an L2 table")
        }
        for sector in l1 {
            try await image.checkOverlap(
                sector.host, sector.memory.count, ignoring: .activeL1, "the L1 table")
        }
        // A table in the last cluster of a file that was cut there.
        if let end = tables.map({ $0.host + $0.memory.count }).max(), end > file.size {
            try await image.ensureSize(end)
        }
        if !tables.isEmpty { await file.reached(.l2Update) }
        if !l1.isEmpty { await file.reached(.l1Update) }
        try await QCOW2TableCache.write(tables + l1, to: file)
    }

    // MARK: Giving back

    /// Step 6, for removals that are durable and that no request in flight saw undone.
    private func releaseFrozen() async throws(BlockError) {
        guard frozenIsDurable, epochs.olderIsEmpty else { return }
        // Taken out first: a failure in between leaks, and nothing is given back twice.
        while let removal = frozen.popLast() {
            // A reader that saw the old entries may have brought them back.
            decompressed.removeAll()
            if removal.discards { try await discardBelow(removal) }
            try await refcounts.release(removal.first, removal.count)
        }
        frozenIsDurable = false
    }

    /// Gives space back below, of clusters that nothing refers to any more.
    func discardBelow(_ removal: Removal) async throws(BlockError) {
        // A count of one, below, is the removed reference: nobody may add another meanwhile.
        refcounts.closeOpenCluster(in: removal.first, removal.count)
        var cluster = removal.first
        let end = removal.first + removal.count
        while cluster < end {
            var next = cluster
            while next < end, try await refcounts.count(of: next) == 1 { next += 1 }
            if next > cluster {
                let offset = cluster << geometry.clusterBits
                let count = min((next - cluster) << geometry.clusterBits, file.size - offset)
                if count > 0, image.overlap(offset, count) == nil {
                    // A hint: what cannot be given back stays.
                    try? await file.discard(ByteRange(offset, count))
                }
            }
            cluster = max(next, cluster + 1)
        }
    }

    // MARK: Close

    public func close() async throws(BlockError) {
        cleaner?.cancel()
        try await writeOutForClosing()
    }

    /// Leaves the image as a program finds it that opens it next. The driver can go on.
    func writeOutForClosing() async throws(BlockError) {
        guard !node.isReadOnly, image.writeFailure == nil else { return }
        // Twice: what the first gives back changes counts.
        try await commit()
        try await commit()
        // The image is left in order whether or not its bitmaps can be: they stay marked in use then.
        var failure: BlockError?
        do throws(BlockError) { try await bitmaps.store() } catch { failure = error }
        try await refcounts.writeBlocks()
        try await file.flush()
        // What a change of references left behind is for the next who opens the image.
        if image.header.incompatible.contains(.dirty), !changesReferences {
            image.header.incompatible.remove(.dirty)
            try await image.writeHeader()
            try await file.flush()
        }
        if image.hasGrown {
            // The file grew in steps, ahead of its use.
            let end = try await refcounts.lastUsedEnd(fileSize: file.size) << geometry.clusterBits
            if end >= image.grownFrom, end < file.size { try? await file.resize(to: end) }
        }
        if let failure { throw failure }
    }
}
