import BlockCore

// What a repair does, once everything was looked at.

extension QCOW2Check {
    func mend(_ first: Findings) async throws(BlockError) {
        guard report.checkErrors == 0, keysAreKnown else {
            let what =
                report.checkErrors > 0
                ? "parts of the image cannot be read"
                : "it is not known which clusters hold the image's keys"
            note("Nothing is repaired while \(what)")
            leave(first)
            return
        }
        guard mendsCounts else {
            stage = .settled
            try await mendLeaks(first)
            return
        }
        if isOpening, report.corruptions > 0 || lacksSnapshots || !first.excess.isEmpty {
            leave(first)
            return
        }
        try await mendStructures()
        tellFaults(isRepaired: true)
        var findings = first
        for _ in 0..<Self.repairRoundsMax where !findings.excess.isEmpty {
            try await drop(findings.excess)
            findings = try await compareAll()
        }
        if findings.l1IsShared { movesL1 = true }
        if findings.needsRebuild || movesL1 || rewritesSnapshotTable {
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

    /// Nothing is repaired.
    private func leave(_ findings: Findings) {
        tellFaults(isRepaired: false)
        report.corruptions += findings.lowCount + findings.brokenBlockCount
        report.leaks += findings.leakCount
    }

    /// Writes what the survey decided: it is off the disk before any count falls.
    private func mendStructures() async throws(BlockError) {
        try await mendHeader()
        stage = .mending
        if hasFaultyEntries {
            var batch: [UInt64] = []
            try await forEachL1Entry { table, index, raw, _ throws(BlockError) in
                guard let entry = self.soundL1Entry(raw, table, index) else { return }
                batch.append(UInt64(entry.offset))
                if batch.count >= Self.tableBatchCount {
                    try await self.mendTables(of: &batch)
                }
            }
            try await mendTables(of: &batch)
        }
        stage = .settled
        try await mendBitmaps()
        try await file.flush()
    }

    private func mendTables(of batch: inout [UInt64]) async throws(BlockError) {
        try await forEachTable(of: &batch) { _, table, _ in self.mendEntries(of: table) }
    }

    private func mendLeaks(_ findings: Findings) async throws(BlockError) {
        report.corruptions += findings.lowCount + findings.brokenBlockCount
        // A block that lies over something else is not written.
        if findings.brokenBlockCount > 0, findings.leakCount > 0 {
            note("No leaks are repaired while refcount blocks are wrong")
            report.leaks += findings.leakCount
        } else if !mendsLeaks, findings.leakCount > 0 {
            note("No leaks are repaired while snapshots cannot be read: they may be theirs")
            report.leaks += findings.leakCount
        } else if findings.leakCount > 0 {
            try await writeCounts(raises: false)
            report.leaksFixed += findings.leakCount
        }
        // Refcounts can be believed where no reference is wrong: flags follow from them without a guess.
        flagsAreAlone = report.corruptions == 0
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            if self.flagsAreAlone {
                guard counts.hasWrongFlags || self.suspectsDataFlags else { return }
                self.report.corruptionsFixed += try await self.checkFlags(counts, stored: [:])
                return
            }
            var stored = findings.stored
            for (cluster, count) in stored
            where self.mendsLeaks && count > counts.count(of: cluster) {
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

    /// Drops references that the refcounts' width cannot count: snapshots' tables first, then data, then
    /// tables of the disk. References are counted anew after each: what went may have freed more.
    private func drop(_ excess: [Int: UInt64]) async throws(BlockError) {
        var excess = excess
        var hasDropped = try await dropTables(&excess, ofSnapshots: true)
        if !hasDropped { hasDropped = try await dropData(&excess) }
        if !hasDropped { hasDropped = try await dropTables(&excess, ofSnapshots: false) }
        try await file.flush()
    }

    /// - Returns: whether there were any.
    private func dropTables(
        _ excess: inout [Int: UInt64], ofSnapshots: Bool
    ) async throws(BlockError) -> Bool {
        var rest = excess
        var hasDropped = false
        try await forEachL1Entry { table, index, raw, changed throws(BlockError) in
            guard (table >= 0) == ofSnapshots, let entry = self.soundL1Entry(raw, table, index)
            else { return }
            let cluster = entry.offset >> self.clusterBits
            guard let left = rest[cluster], left > 0 else { return }
            rest[cluster] = left - 1
            changed = 0
            hasDropped = true
            self.note(
                "Repaired: a reference too many to the L2 table at \(entry.offset) is dropped")
            self.report.corruptionsFixed += 1
        }
        excess = rest
        return hasDropped
    }

    /// - Returns: whether there were any.
    private func dropData(_ excess: inout [Int: UInt64]) async throws(BlockError) -> Bool {
        let before = report.corruptionsFixed
        var rest = excess
        var batch: [UInt64] = []
        try await forEachL1Entry { table, index, raw, _ throws(BlockError) in
            guard let entry = self.soundL1Entry(raw, table, index) else { return }
            batch.append(UInt64(entry.offset))
            if batch.count >= Self.tableBatchCount {
                try await self.forEachTable(of: &batch) { _, memory, use in
                    self.dropExcess(memory, use, &rest)
                }
            }
        }
        try await forEachTable(of: &batch) { _, memory, use in
            self.dropExcess(memory, use, &rest)
        }
        excess = rest
        return report.corruptionsFixed > before
    }
}
