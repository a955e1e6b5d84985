import BlockCore

// What a repair does, once everything was looked at.

extension QCOW2Check {
    func mend(_ first: Findings) async throws(BlockError) {
        guard report.checkErrors == 0 else {
            note("Nothing is repaired while parts of the image cannot be read")
            report.corruptions += first.lowCount + first.brokenBlockCount
            report.leaks += first.leakCount
            return
        }
        guard mendsErrors else {
            try await mendLeaks(first)
            return
        }
        var findings = first
        for _ in 0..<Self.repairRoundsMax where !findings.excess.isEmpty {
            try await drop(findings.excess)
            findings = try await compareAll()
        }
        if findings.l1IsShared { movesL1 = true }
        if findings.needsRebuild || movesL1 || newSnapshotTable != nil {
            note("Rebuilding refcount structure")
            try await rebuild()
        } else if findings.lowCount > 0 || findings.leakCount > 0 {
            try await writeCounts(raises: true)
        }
        report.corruptionsFixed += first.lowCount + first.brokenBlockCount
        report.leaksFixed += first.leakCount
        // Whatever was written changed what the flags must say.
        if report.corruptionsFixed > 0 || report.leaksFixed > 0 || findings.suspectsFlags {
            try await mendFlags()
        }
        try await markClean()
    }

    private func mendLeaks(_ findings: Findings) async throws(BlockError) {
        report.corruptions += findings.lowCount + findings.brokenBlockCount
        if findings.leakCount > 0 { try await writeCounts(raises: false) }
        report.leaksFixed += findings.leakCount
        // Refcounts can be believed where no reference is wrong: flags follow from them without a guess.
        flagsAreAlone = report.corruptions == 0
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            if self.flagsAreAlone {
                guard counts.hasWrongFlags || self.suspectsDataFlags else { return }
                self.report.corruptionsFixed += try await self.checkFlags(counts, stored: [:])
                return
            }
            var stored = findings.stored
            for (cluster, count) in stored where count > counts.count(of: cluster) {
                stored[cluster] = nil
            }
            if counts.hasWrongFlags || !stored.isEmpty {
                self.report.corruptions += try await self.checkFlags(counts, stored: stored)
            }
        }
        try await markClean()
    }

    private func mendFlags() async throws(BlockError) {
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            guard counts.hasWrongFlags || self.suspectsDataFlags else { return }
            self.report.corruptionsFixed += try await self.checkFlags(counts, stored: [:])
        }
    }

    /// The image has nothing wrong any more: it need not be marked.
    private func markClean() async throws(BlockError) {
        guard report.corruptions == 0, report.checkErrors == 0 else { return }
        let marks: QCOW2.IncompatibleFeatures = [.dirty, .corrupt]
        guard !header.incompatible.isDisjoint(with: marks) else { return }
        try await file.flush()
        header.incompatible.subtract(marks)
        try await patchHeader()
    }

    // MARK: References that are too many

    /// Drops references that the refcounts' width cannot count: whole tables first, since that frees
    /// what they refer to.
    private func drop(_ excess: [Int: UInt64]) async throws(BlockError) {
        var excess = excess
        var hasDropped = false
        try await forEachL1Entry { table, index, raw, changed throws(BlockError) in
            guard let entry = self.soundL1Entry(raw, table, index) else { return }
            let cluster = entry.offset >> self.clusterBits
            guard let left = excess[cluster], left > 0 else { return }
            excess[cluster] = left - 1
            changed = 0
            hasDropped = true
            self.note(
                "Repaired: a reference too many to the L2 table at \(entry.offset) is dropped")
            self.report.corruptionsFixed += 1
        }
        if !hasDropped {
            var batch: [UInt64] = []
            try await forEachL1Entry { table, index, raw, _ throws(BlockError) in
                guard let entry = self.soundL1Entry(raw, table, index) else { return }
                batch.append(UInt64(entry.offset))
                if batch.count >= Self.rememberedMax {
                    try await self.forEachTable(of: &batch) { _, memory, use in
                        self.dropExcess(memory, use, &excess)
                    }
                }
            }
            try await forEachTable(of: &batch) { _, memory, use in
                self.dropExcess(memory, use, &excess)
            }
        }
        try await file.flush()
    }

    // MARK: Structures that must not be followed as tables

    /// Sorts out where everything but L2 tables and data lies.
    func collectFixedStructures() {
        var ranges: [Range<Int>] = []
        func add(_ offset: Int, _ count: Int) {
            guard count > 0, let range = ByteRange(checking: offset, count: count) else { return }
            let first = offset >> clusterBits
            ranges.append(first..<((range.end - 1) >> clusterBits + 1))
        }
        add(0, geometry.clusterSize)
        add(header.l1Offset, header.l1EntryCount * 8)
        add(header.refcountTableOffset, header.refcountTableClusters << clusterBits)
        add(header.snapshotsOffset, header.snapshotCount > 0 ? max(snapshotTableBytes, 1) : 0)
        for snapshot in snapshots { add(snapshot.l1Offset, snapshot.l1EntryCount * 8) }
        for index in refcountTable.indices {
            if let block = refcountBlock(index) { add(block, geometry.clusterSize) }
        }
        for place in bitmaps.structures { add(place.offset, place.count) }
        fixedStructures = ranges.sorted { $0.lowerBound < $1.lowerBound }
        // So that a search finds the one range that can contain a cluster.
        var joined: [Range<Int>] = []
        for range in fixedStructures {
            if let last = joined.last, last.upperBound > range.lowerBound {
                let end = max(last.upperBound, range.upperBound)
                joined[joined.count - 1] = last.lowerBound..<end
            } else {
                joined.append(range)
            }
        }
        fixedStructures = joined
    }

    func fixedStructure(at cluster: Int) -> Range<Int>? {
        var low = 0
        var high = fixedStructures.count
        while low < high {
            let middle = (low + high) / 2
            if fixedStructures[middle].upperBound <= cluster {
                low = middle + 1
            } else {
                high = middle
            }
        }
        guard low < fixedStructures.count, fixedStructures[low].contains(cluster) else {
            return nil
        }
        return fixedStructures[low]
    }
}
