import BlockCore

// Who refers to which cluster.

extension QCOW2Check {
    /// Counts every reference there is, but for those that a repair takes away.
    func countAll(
        _ counts: QCOW2ReferenceCounts, withRefcounts: Bool
    ) async throws(BlockError) {
        counts.add(0, 1, .plain)
        if !movesL1 {
            let isThere = region(
                header.l1Offset, header.l1EntryCount * 8, "the L1 table", counts, mended: true)
            if !isThere, mendsErrors { movesL1 = true }
        }
        for snapshot in snapshots {
            let isThere = region(
                snapshot.l1Offset, snapshot.l1EntryCount * 8,
                "the L1 table of snapshot '\(snapshot.name)'", counts)
            if !isThere { lacksSnapshots = true }
        }
        if !rewritesSnapshotTable, header.snapshotCount > 0 {
            region(header.snapshotsOffset, snapshotTableBytes, "the snapshot table", counts)
        }
        countEncryptionHeader(counts)
        try await countBitmaps(counts)
        try await countTables(counts)
        if withRefcounts { countRefcountStructures(counts) }
    }

    /// Counts the clusters of a structure.
    ///
    /// - Parameter mended: a repair gives it another place, where the file ends within it.
    /// - Returns: whether it lies within the file: its last cluster may be there in part.
    @discardableResult
    func region(
        _ offset: Int, _ count: Int, _ name: @autoclosure () -> String,
        _ counts: QCOW2ReferenceCounts, mended: Bool = false
    ) -> Bool {
        if count == 0 { return true }
        guard let range = ByteRange(checking: offset, count: count), isInFile(range) else {
            corruption(
                "\(name()), \(count) bytes at \(offset), lies past the end of the file",
                mended: mended)
            return false
        }
        let first = offset >> clusterBits
        counts.add(first, (range.end - 1) >> clusterBits - first + 1, .plain)
        return true
    }

    /// Its last cluster may be there in part.
    func isInFile(_ range: ByteRange) -> Bool { range.end - fileSize < geometry.clusterSize }

    private func countRefcountStructures(_ counts: QCOW2ReferenceCounts) {
        let bytes = header.refcountTableClusters << clusterBits
        let place = ByteRange(checking: header.refcountTableOffset, count: bytes)
        let isThere = place.map(isInFile) ?? false
        if !isThere, mendsCounts { mustRebuild = true }
        // Opening mends it, as it does all counts.
        if isThere || !isOpening {
            region(
                header.refcountTableOffset, bytes, "the refcount table", counts, mended: true)
        }
        for index in refcountTable.indices {
            if let block = refcountBlock(index) { counts.add(block >> clusterBits, 1, .plain) }
        }
    }

    /// Where refcount block `index` is; `nil` where there is none, or its entry is wrong.
    func refcountBlock(_ index: Int) -> Int? {
        let entry = refcountTable[index]
        guard entry != 0, entry < UInt64(QCOW2.Limit.hostOffsetMax),
            Int(entry).isAligned(to: geometry.clusterSize), Int(entry) < fileSize
        else { return nil }
        return Int(entry)
    }

    // MARK: L1 tables

    /// L2 tables to look at: their offsets, with bit 0 set for those of the active L1 table.
    static let tableBatchCount = 1 << 20
    private static let l1ChunkBytes = 256 << 10

    private func countTables(_ counts: QCOW2ReferenceCounts) async throws(BlockError) {
        var batch: [UInt64] = []
        try await forEachL1Entry { table, index, raw, _ throws(BlockError) in
            guard let entry = self.soundL1Entry(raw, table, index) else { return }
            let isActive = table < 0
            // Flags of a snapshot's table mean nothing: they are as they were when it was made.
            let reference: QCOW2ReferenceCounts.Reference =
                !isActive ? .plain : entry.isCopied ? .copied : .shared
            counts.add(entry.offset >> self.clusterBits, 1, reference)
            batch.append(UInt64(entry.offset) | (isActive ? 1 : 0))
            if batch.count >= Self.tableBatchCount {
                try await self.countEntries(of: &batch, counts)
            }
        }
        try await countEntries(of: &batch, counts)
    }

    /// Reads the active L1 table (number -1) and those of snapshots, an entry that is not 0 at a
    /// time.
    ///
    /// - Parameter body: may change the entry, which is then written, unless this is the survey.
    func forEachL1Entry(
        _ body: (Int, Int, UInt64, inout UInt64) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        try await forEachEntry(ofL1: -1, header.l1Offset, header.l1EntryCount, body)
        for (number, snapshot) in snapshots.enumerated() {
            try await forEachEntry(
                ofL1: number, snapshot.l1Offset, snapshot.l1EntryCount, body)
        }
    }

    func forEachEntry(
        ofL1 table: Int, _ offset: Int, _ count: Int,
        _ body: (Int, Int, UInt64, inout UInt64) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        // Past the end of the file there are zeroes.
        let there = min(count * 8, max(0, fileSize - offset))
        let chunks = (there + Self.l1ChunkBytes - 1) / Self.l1ChunkBytes
        try await readEach(chunks) { number in
            let start = number * Self.l1ChunkBytes
            return ByteRange(offset + start, min(Self.l1ChunkBytes, count * 8 - start))
        } _: { number, memory, error throws(BlockError) in
            if let error {
                self.failure("the L1 table at \(offset)", error)
                return
            }
            let bytes = memory.bytes
            for index in 0..<(memory.count / 8) {
                let raw: UInt64 = UnsafeRawBufferPointer(bytes).bigEndian(at: index * 8)
                if raw == 0 { continue }
                let position = number * Self.l1ChunkBytes / 8 + index
                var changed = self.judgedL1Entry(raw, table, position)
                try await body(table, position, changed, &changed)
                if changed != raw, self.stage != .survey {
                    bytes.storeBigEndian(changed, at: index * 8)
                    try await self.writeBack(
                        memory, at: offset + number * Self.l1ChunkBytes,
                        index * 8..<index * 8 + 8)
                }
            }
        }
    }

    private static let l1ReservedMask: UInt64 = 0x7f00_0000_0000_01ff

    /// The entry as a repair leaves it: 0 where it has to go. Without a repair, the entry.
    private func judgedL1Entry(_ raw: UInt64, _ table: Int, _ index: Int) -> UInt64 {
        guard judges else { return raw }
        let entry = mendedL1Entry(raw, table, index)
        if entry != raw {
            hasFaultyEntries = true
            if table >= 0 { faultySnapshots.insert(table) }
        }
        return entry
    }

    private func mendedL1Entry(_ raw: UInt64, _ table: Int, _ index: Int) -> UInt64 {
        var entry = raw
        if entry & Self.l1ReservedMask != 0 {
            corruption("entry \(index) of the L1 table has reserved bits", mended: true)
            entry &= ~Self.l1ReservedMask
        }
        let offset = QCOW2.L1Entry(rawValue: entry).offset
        if offset == 0 {
            // Harmless; in a snapshot the flag has no meaning.
            return table < 0 ? entry & ~QCOW2.L1Entry.copiedFlag : entry
        }
        if let fault = l1Fault(offset) {
            corruption("entry \(index) of the L1 table is dropped: \(fault)", mended: true)
            return 0
        }
        let cluster = offset >> clusterBits
        if distrusted.contains(cluster) || vital.contains(where: { $0.contains(cluster) }) {
            corruption(
                "entry \(index) of the L1 table is dropped: it names cluster \(cluster), which "
                    + "holds something else", mended: true)
            return 0
        }
        return entry
    }

    private func l1Fault(_ offset: Int) -> String? {
        if !offset.isAligned(to: geometry.clusterSize) {
            return "L2 table at \(offset), which is no cluster"
        }
        if offset >= offsetEnd { return "L2 table at \(offset), past the end of the file" }
        return nil
    }

    /// The entry, if it leads to an L2 table.
    func soundL1Entry(_ raw: UInt64, _ table: Int, _ index: Int) -> QCOW2.L1Entry? {
        let entry = QCOW2.L1Entry(rawValue: raw)
        if raw & Self.l1ReservedMask != 0 {
            corruption("entry \(index) of the L1 table has reserved bits: \(hex(raw))")
        }
        if entry.offset == 0 { return nil }
        if let fault = l1Fault(entry.offset) {
            corruption("entry \(index) of the L1 table is wrong: \(fault)")
            if table >= 0 { lacksSnapshots = true }
            return nil
        }
        return entry
    }

    func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }

    // MARK: L2 tables

    /// L2 tables that follow each other in the file, to be read at once.
    struct TableRun {
        var offset: Int
        var count: Int
        /// For each, how often the active L1 table names it, and others do.
        var uses: [(active: Int, other: Int)]
    }

    static let tableRunBytesMax = 256 << 10

    /// Sorts tables by place: each is read once, however many entries name it.
    func runs(of batch: inout [UInt64]) -> [TableRun] {
        batch.sort()
        var runs: [TableRun] = []
        var index = 0
        while index < batch.count {
            let offset = Int(batch[index] & ~1)
            var use = (active: 0, other: 0)
            while index < batch.count, Int(batch[index] & ~1) == offset {
                if batch[index] & 1 != 0 { use.active += 1 } else { use.other += 1 }
                index += 1
            }
            let size = geometry.clusterSize
            if let last = runs.last, last.offset + last.count == offset,
                last.count + size <= Self.tableRunBytesMax
            {
                runs[runs.count - 1].count += size
                runs[runs.count - 1].uses.append(use)
            } else {
                runs.append(TableRun(offset: offset, count: size, uses: [use]))
            }
        }
        batch = []
        return runs
    }

    /// Reads the tables of `batch`, each once.
    ///
    /// - Parameter body: gets a table's place, its memory and its uses; returns the bytes that it
    ///   changed, which are then written, unless this is the survey.
    func forEachTable(
        of batch: inout [UInt64],
        _ body: (Int, IOSlice, (active: Int, other: Int)) -> Range<Int>?
    ) async throws(BlockError) {
        let runs = runs(of: &batch)
        try await readEach(runs.count) {
            ByteRange(runs[$0].offset, runs[$0].count)
        } _: {
            number, memory, error throws(BlockError) in
            let run = runs[number]
            if let error {
                self.failure("the L2 table at \(run.offset)", error)
                return
            }
            let size = self.geometry.clusterSize
            for (index, use) in run.uses.enumerated() {
                let table = memory.slice(index * size, size)
                let host = run.offset + index * size
                if let changed = body(host, table, use), self.stage != .survey {
                    try await self.writeBack(table, at: host, changed)
                }
            }
        }
    }

    private func countEntries(
        of batch: inout [UInt64], _ counts: QCOW2ReferenceCounts
    ) async throws(BlockError) {
        try await forEachTable(of: &batch) { host, table, use in
            self.countEntries(host, table, use, counts)
            return nil
        }
    }
}
