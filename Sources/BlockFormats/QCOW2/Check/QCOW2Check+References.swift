import BlockCore

// Who refers to which cluster.

extension QCOW2Check {
    /// Counts every reference there is, but for those that a repair takes away.
    func countAll(
        _ counts: QCOW2ReferenceCounts, withRefcounts: Bool
    ) async throws(BlockError) {
        counts.add(0, 1, .plain)
        if !movesL1 {
            let isThere = region(header.l1Offset, header.l1EntryCount * 8, "the L1 table", counts)
            if !isThere, mendsErrors { movesL1 = true }
        }
        for snapshot in snapshots {
            region(
                snapshot.l1Offset, snapshot.l1EntryCount * 8,
                "the L1 table of snapshot '\(snapshot.name)'", counts)
        }
        if newSnapshotTable == nil, header.snapshotCount > 0 {
            region(header.snapshotsOffset, snapshotTableBytes, "the snapshot table", counts)
        }
        countEncryptionHeader(counts)
        try await countBitmaps(counts)
        try await countTables(counts)
        if withRefcounts { countRefcountStructures(counts) }
    }

    /// Counts the clusters of a structure.
    ///
    /// - Returns: whether it lies within the file: its last cluster may be there in part.
    @discardableResult
    func region(
        _ offset: Int, _ count: Int, _ name: @autoclosure () -> String,
        _ counts: QCOW2ReferenceCounts
    ) -> Bool {
        if count == 0 { return true }
        guard let range = ByteRange(checking: offset, count: count),
            range.end - fileSize < geometry.clusterSize
        else {
            corruption("\(name()), \(count) bytes at \(offset), lies past the end of the file")
            return false
        }
        let first = offset >> clusterBits
        counts.add(first, (range.end - 1) >> clusterBits - first + 1, .plain)
        return true
    }

    private func countEncryptionHeader(_ counts: QCOW2ReferenceCounts) {
        guard header.encryptionMethod == 2 else { return }
        guard
            let data = header.extensions.first(where: {
                $0.type == QCOW2.HeaderExtension.encryptionHeader
            })?.data, data.count >= 16
        else {
            // The keys are lost: nothing that a repair could mend.
            corruption("the image is encrypted, and the encryption header has no place")
            return
        }
        let place = data.withUnsafeBytes { bytes in
            ByteRange(
                checking: bytes.bigEndian(at: 0, as: UInt64.self),
                count: bytes.bigEndian(at: 8, as: UInt64.self))
        }
        guard let place else {
            corruption("the encryption header has no place that a file has")
            return
        }
        if !place.offset.isAligned(to: geometry.clusterSize) {
            corruption("the encryption header is at \(place.offset), which is no cluster")
        }
        region(place.offset, place.count, "the encryption header", counts)
    }

    private func countRefcountStructures(_ counts: QCOW2ReferenceCounts) {
        region(
            header.refcountTableOffset, header.refcountTableClusters << clusterBits,
            "the refcount table", counts)
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
    private static let batchCount = 1 << 20
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
            if batch.count >= Self.batchCount {
                try await self.countEntries(of: &batch, counts)
            }
        }
        try await countEntries(of: &batch, counts)
    }

    /// Reads the active L1 table (number -1) and those of snapshots, an entry that is not 0 at a
    /// time.
    ///
    /// - Parameter body: may change the entry, which is then written.
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
                var changed = self.mendedL1Entry(raw, table, position)
                try await body(table, position, changed, &changed)
                if changed != raw {
                    bytes.storeBigEndian(changed, at: index * 8)
                    try await self.writeBack(
                        memory, at: offset + number * Self.l1ChunkBytes,
                        index * 8..<index * 8 + 8)
                }
            }
        }
    }

    private static let l1ReservedMask: UInt64 = 0x7f00_0000_0000_01ff

    /// The entry as a repair makes it, once: 0 where it has to go. Without a repair, the entry.
    private func mendedL1Entry(_ raw: UInt64, _ table: Int, _ index: Int) -> UInt64 {
        guard isSurvey, mendsErrors else { return raw }
        var entry = raw
        if entry & Self.l1ReservedMask != 0 {
            corruption("entry \(index) of the L1 table has reserved bits", mended: true)
            entry &= ~Self.l1ReservedMask
        }
        let offset = QCOW2.L1Entry(rawValue: entry).offset
        if offset == 0 { return entry & ~QCOW2.L1Entry.copiedFlag }
        if let fault = l1Fault(offset) {
            corruption("entry \(index) of the L1 table is dropped: \(fault)", mended: true)
            return 0
        }
        if let structure = fixedStructure(at: offset >> clusterBits) {
            corruption(
                "entry \(index) of the L1 table is dropped: it names cluster "
                    + "\(offset >> clusterBits), which belongs to the structure at cluster "
                    + "\(structure.lowerBound)", mended: true)
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
    ///   changed, which are then written.
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
                if let changed = body(host, table, use) {
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
        }
    }
}
