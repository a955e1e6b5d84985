import BlockCore

// The stored refcounts, compared with the references and written in place.

extension QCOW2Check {
    /// Clusters that a comparison looks at: those of the file.
    private var comparedEnd: Int {
        max(geometry.clusterCount(for: fileSize), min(highestReferenced + 1, 1 << 47))
    }

    /// The clusters that refcount block `index` counts.
    private func coverage(_ index: Int) -> Range<Int> {
        let first = index << geometry.refcountBlockBits
        return first..<(first + geometry.clustersPerRefcountBlock)
    }

    // MARK: Compare

    func compare(
        _ counts: QCOW2ReferenceCounts, _ findings: inout Findings
    ) async throws(BlockError) {
        if counts.window.lowerBound == 0 { checkBlockEntries(&findings) }
        let area = counts.window.clamped(to: 0..<comparedEnd)
        let blocks = refcountTable.indices.filter { index in
            refcountBlock(index) != nil && coverage(index).overlaps(area)
        }
        checkBlockCounts(counts, &findings)
        var result = findings
        var next = area.lowerBound
        try await readEach(blocks.count) { number in
            ByteRange(refcountBlock(blocks[number]) ?? 0, geometry.clusterSize)
        } _: { number, memory, error throws(BlockError) in
            let covered = self.coverage(blocks[number]).clamped(to: area)
            self.compareUncounted(next..<max(next, covered.lowerBound), counts, &result)
            next = covered.upperBound
            if let error {
                if !self.isComparedOnce {
                    self.note(
                        "ERROR: cannot read refcount block \(blocks[number]): \(error.message)")
                    self.report.checkErrors += 1
                }
                return
            }
            self.compare(covered, of: blocks[number], memory, counts, &result)
        }
        compareUncounted(next..<max(next, area.upperBound), counts, &result)
        findings = result
    }

    /// Entries of the refcount table that lead nowhere.
    private func checkBlockEntries(_ findings: inout Findings) {
        for (index, entry) in refcountTable.enumerated()
        where entry != 0 && refcountBlock(index) == nil {
            findings.brokenBlockCount += 1
            findings.needsRebuild = true
            if !isComparedOnce {
                note("ERROR refcount block \(index) cannot be at \(hex(entry))")
            }
        }
    }

    /// Refcount blocks that something else lies in too.
    private func checkBlockCounts(_ counts: QCOW2ReferenceCounts, _ findings: inout Findings) {
        for index in refcountTable.indices {
            guard let block = refcountBlock(index) else { continue }
            let cluster = block >> clusterBits
            let count = counts.count(of: cluster)
            guard counts.window.contains(cluster), count != 1 else { continue }
            findings.brokenBlockCount += 1
            findings.needsRebuild = true
            if !isComparedOnce { note("ERROR refcount block \(index) refcount=\(count)") }
        }
    }

    /// Structures that are written in place and share clusters with something else.
    func noteShared(_ counts: QCOW2ReferenceCounts, _ findings: inout Findings) {
        guard mendsCounts else { return }
        let bytes = header.refcountTableClusters << clusterBits
        if isShared(clusters(header.refcountTableOffset, bytes), counts) {
            findings.needsRebuild = true
        }
        let l1 = clusters(header.l1Offset, header.l1EntryCount * 8)
        if !movesL1, isShared(l1, counts) { findings.l1IsShared = true }
    }

    /// Clusters that no refcount block counts: nothing may use them.
    private func compareUncounted(
        _ range: Range<Int>, _ counts: QCOW2ReferenceCounts, _ findings: inout Findings
    ) {
        var rest = range
        while let cluster = counts.firstUsed(in: rest) {
            findings.needsRebuild = true
            mismatch(cluster, stored: 0, counts.count(of: cluster), &findings)
            rest = (cluster + 1)..<range.upperBound
        }
    }

    private func compare(
        _ range: Range<Int>, of index: Int, _ memory: IOSlice, _ counts: QCOW2ReferenceCounts,
        _ findings: inout Findings
    ) {
        let bytes = UnsafeRawBufferPointer(memory.bytes)
        if ZeroDetection.isZero(bytes), !counts.isUsed(range) { return }
        let first = coverage(index).lowerBound
        for cluster in range {
            let stored = QCOW2.Refcount.get(
                bytes, cluster - first, order: geometry.refcountOrder)
            let count = counts.count(of: cluster)
            if stored == count {
                if stored != 0 { usedEnd = max(usedEnd, cluster + 1) }
            } else {
                mismatch(cluster, stored: stored, count, &findings)
            }
        }
    }

    private func mismatch(
        _ cluster: Int, stored: UInt64, _ count: UInt64, _ findings: inout Findings
    ) {
        usedEnd = max(usedEnd, cluster + 1)
        if count > geometry.refcountMax, findings.excess.count < Self.rememberedMax {
            findings.excess[cluster] = count - geometry.refcountMax
        }
        if findings.stored.count < Self.rememberedMax { findings.stored[cluster] = stored }
        if stored > count { findings.leakCount += 1 } else { findings.lowCount += 1 }
        guard !isComparedOnce else { return }
        let mends = stored > count ? mendsLeaks : mendsCounts
        let word = mends ? "Repairing" : stored > count ? "Leaked" : "ERROR"
        note("\(word) cluster \(cluster) refcount=\(stored) reference=\(count)")
    }

    // MARK: Write

    /// Makes the counts in place what the references are.
    ///
    /// - Parameter raises: counts that are too low too; else only those that are too high.
    func writeCounts(raises: Bool) async throws(BlockError) {
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            let area = counts.window.clamped(to: 0..<self.comparedEnd)
            let blocks = self.refcountTable.indices.filter { index in
                self.refcountBlock(index) != nil && self.coverage(index).overlaps(area)
            }
            try await self.readEach(blocks.count) { number in
                ByteRange(self.refcountBlock(blocks[number]) ?? 0, self.geometry.clusterSize)
            } _: { number, memory, error throws(BlockError) in
                if let error { throw error }
                let covered = self.coverage(blocks[number])
                let changed = self.setCounts(
                    covered.clamped(to: area), covered.lowerBound, memory, counts, raises)
                if let changed, let place = self.refcountBlock(blocks[number]) {
                    try await self.writeBack(memory, at: place, changed)
                }
            }
        }
        try await file.flush()
    }

    /// - Returns: the bytes of the block that changed.
    private func setCounts(
        _ range: Range<Int>, _ first: Int, _ memory: IOSlice, _ counts: QCOW2ReferenceCounts,
        _ raises: Bool
    ) -> Range<Int>? {
        let order = geometry.refcountOrder
        var changed: Range<Int>?
        for cluster in range {
            let stored = QCOW2.Refcount.get(
                UnsafeRawBufferPointer(memory.bytes), cluster - first, order: order)
            let count = min(counts.count(of: cluster), geometry.refcountMax)
            guard stored > count || (raises && stored < count) else { continue }
            QCOW2.Refcount.set(memory.bytes, cluster - first, to: count, order: order)
            let byte = ((cluster - first) << order) >> 3
            changed = (changed?.lowerBound ?? byte)..<min(memory.count, byte + 8)
        }
        return changed
    }

    // MARK: Flags

    /// Compares the COPIED flags of the active tables with the refcounts, for clusters in the window
    /// of `counts`, and repairs them if asked.
    ///
    /// - Parameter stored: refcounts that are not what `counts` says.
    /// - Returns: how many were wrong.
    func checkFlags(
        _ counts: QCOW2ReferenceCounts, stored: [Int: UInt64]
    ) async throws(BlockError) -> Int {
        var wrong = 0
        var batch: [UInt64] = []
        func refcount(_ cluster: Int) -> UInt64? {
            // What lies past the end of the file was found already.
            guard counts.window.contains(cluster), cluster < comparedEnd else { return nil }
            return stored[cluster] ?? counts.count(of: cluster)
        }
        try await forEachEntry(ofL1: -1, header.l1Offset, header.l1EntryCount) {
            table, index, raw, changed throws(BlockError) in
            guard let entry = self.soundL1Entry(raw, table, index) else { return }
            batch.append(UInt64(entry.offset) | 1)
            if let count = refcount(entry.offset >> self.clusterBits),
                (count == 1) != entry.isCopied
            {
                wrong += 1
                self.note(
                    "\(self.mendsFlags ? "Repairing" : "ERROR") OFLAG_COPIED L2 cluster: "
                        + "l1_index=\(index) l1_entry=\(String(raw, radix: 16)) refcount=\(count)")
                if self.mendsFlags { changed ^= QCOW2.L1Entry.copiedFlag }
            }
        }
        var wrongEntries = 0
        // In a data file every cluster is this image's alone.
        let isFirst = counts.window.lowerBound == 0
        let dataCount = hasDataFile ? { _ in isFirst ? 1 : nil } : refcount
        try await forEachTable(of: &batch) { _, table, _ in
            self.checkFlags(table, &wrongEntries, dataCount)
        }
        if mendsFlags, wrong + wrongEntries > 0 { try await file.flush() }
        return wrong + wrongEntries
    }
}
