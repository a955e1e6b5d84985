import BlockCore

// Clusters that are claimed for two things, before a repair: which claim is believed.
//
//   L2 table     what the active L1 table names is one, if it looks like one; what snapshots alone
//                name is one, if nothing would have to be mended in it
//   snapshot     stays, if nothing would have to be mended in its L1 table
//   bitmap       goes: what it says of the disk may be wrong
//   refcounts    are made anew, beside all that is in use (see `QCOW2Check+Rebuild.swift`)
//   data         stays shared
//
// What a repair leaves shared has a count of two or more, and no COPIED flag: it is not written in place.

extension QCOW2Check {
    /// What shares clusters with something else.
    struct Conflicts {
        /// Clusters of L2 tables.
        var tables: [Int] = []
        /// Numbers of snapshots, for their L1 tables.
        var snapshots = Set<Int>()
        /// Numbers of bitmaps.
        var bitmaps = Set<Int>()
        /// That of the bitmaps.
        var directoryIsShared = false
    }

    private static let tableCountsBytesMax = 32 << 20

    // MARK: Find

    /// Adds what the window of `counts` shows.
    func findConflicts(
        _ counts: QCOW2ReferenceCounts, _ conflicts: inout Conflicts
    ) async throws(BlockError) {
        try await findSharedTables(counts, &conflicts.tables)
        for (number, snapshot) in snapshots.enumerated() {
            let place = clusters(snapshot.l1Offset, snapshot.l1EntryCount * 8)
            if isShared(place, counts) { conflicts.snapshots.insert(number) }
        }
        try await findSharedBitmaps(counts, &conflicts)
    }

    func isShared(_ clusters: Range<Int>, _ counts: QCOW2ReferenceCounts) -> Bool {
        clusters.clamped(to: counts.window).contains { counts.count(of: $0) > 1 }
    }

    /// L2 tables that are named as something else too.
    private func findSharedTables(
        _ counts: QCOW2ReferenceCounts, _ shared: inout [Int]
    ) async throws(BlockError) {
        // Opening makes refcounts anew, and changes nothing else.
        let ignored = isOpening ? refcountStructureUses(counts.window) : [:]
        var start = counts.window.lowerBound
        while start < counts.window.upperBound {
            let uses = QCOW2ReferenceCounts(from: start, budget: Self.tableCountsBytesMax)
            try await forEachL1Entry { table, index, raw, _ throws(BlockError) in
                guard let entry = self.soundL1Entry(raw, table, index) else { return }
                uses.add(entry.offset >> self.clusterBits, 1, .copied)
            }
            let area = uses.window.clamped(to: counts.window)
            var rest = area
            while let cluster = uses.firstUsed(in: rest) {
                let uses = uses.count(of: cluster) + UInt64(ignored[cluster, default: 0])
                if counts.count(of: cluster) != uses { shared.append(cluster) }
                rest = (cluster + 1)..<area.upperBound
            }
            start = area.upperBound
            guard shared.count <= Self.rememberedMax else {
                throw BlockError(
                    .corrupt, "too many L2 tables lie over something else to be told apart",
                    remedy: "copy what can be read to a new image")
            }
        }
    }

    private func findSharedBitmaps(
        _ counts: QCOW2ReferenceCounts, _ conflicts: inout Conflicts
    ) async throws(BlockError) {
        guard let directory = bitmaps.directory else { return }
        // Refcounts are made anew, where they lie over something.
        let refcountUses = refcountStructureUses(counts.window)
        func isAlone(_ cluster: Int) -> Bool {
            !counts.window.contains(cluster)
                || counts.count(of: cluster) <= 1 + UInt64(refcountUses[cluster, default: 0])
        }
        if !clusters(directory.offset, directory.count).allSatisfy(isAlone) {
            conflicts.directoryIsShared = true
        }
        for (number, entry) in bitmaps.entries.enumerated() {
            guard let table = table(of: entry) else { continue }
            var isFree = clusters(table.offset, table.count).allSatisfy(isAlone)
            if isFree {
                try await forEachBitmapCluster(table) { isFree = isFree && isAlone($0) }
            }
            if !isFree { conflicts.bitmaps.insert(number) }
        }
    }

    /// How often the refcounts' structures take each cluster of `window`.
    private func refcountStructureUses(_ window: Range<Int>) -> [Int: Int] {
        var uses: [Int: Int] = [:]
        for index in refcountTable.indices {
            guard let block = refcountBlock(index), window.contains(block >> clusterBits) else {
                continue
            }
            uses[block >> clusterBits, default: 0] += 1
        }
        // One that the file ends within is not counted.
        let bytes = header.refcountTableClusters << clusterBits
        guard let table = ByteRange(checking: header.refcountTableOffset, count: bytes),
            isInFile(table)
        else { return uses }
        for cluster in clusters(table.offset, table.count) { uses[cluster, default: 0] += 1 }
        return uses
    }

    /// References of the refcounts' own structures are none too many: those are made anew.
    func forgetRefcountUses(_ excess: inout [Int: UInt64]) {
        guard let first = excess.keys.min(), let last = excess.keys.max() else { return }
        for (cluster, count) in refcountStructureUses(first..<(last + 1)) {
            guard let over = excess[cluster] else { continue }
            excess[cluster] = over > count ? over - UInt64(count) : nil
        }
    }

    // MARK: Settle

    /// Decides what is believed.
    ///
    /// - Returns: whether something is not: then references have to be counted anew. That can only take
    ///   conflicts away.
    func settle(_ conflicts: Conflicts) async throws(BlockError) -> Bool {
        if isOpening {
            report.corruptions += conflicts.tables.count
            return false
        }
        let strangers = try await strangers(among: conflicts.tables)
        if !strangers.isEmpty {
            distrusted.formUnion(strangers)
            return true
        }
        let broken = conflicts.snapshots.intersection(faultySnapshots)
        for number in broken.sorted(by: >) {
            lastingFault(
                "snapshot '\(snapshots[number].name)' is dropped: its L1 table is said to lie in "
                    + "clusters of something else")
            snapshots.remove(at: number)
            rewritesSnapshotTable = true
        }
        if !broken.isEmpty { return true }
        return settleBitmaps(conflicts)
    }

    private func settleBitmaps(_ conflicts: Conflicts) -> Bool {
        if conflicts.directoryIsShared {
            lastingFault("the bitmaps are dropped: their directory lies over something else")
            bitmaps = Bitmaps(isChanged: true)
            return true
        }
        for number in conflicts.bitmaps.sorted(by: >) {
            let name = Self.printable(bitmaps.entries[number].name)
            lastingFault("bitmap '\(name)' is dropped: it lies over something else")
            bitmaps.entries.remove(at: number)
        }
        if conflicts.bitmaps.isEmpty { return false }
        bitmapsHaveChanged()
        return true
    }

    /// Clusters that are named as L2 tables, and are something else.
    private func strangers(among shared: [Int]) async throws(BlockError) -> Set<Int> {
        if shared.isEmpty { return [] }
        let all = Set(shared)
        var active = Set<Int>()
        try await forEachEntry(ofL1: -1, header.l1Offset, header.l1EntryCount) {
            table, index, raw, _ throws(BlockError) in
            guard let entry = self.soundL1Entry(raw, table, index) else { return }
            let cluster = entry.offset >> self.clusterBits
            if all.contains(cluster) { active.insert(cluster) }
        }
        var result = Set<Int>()
        try await readEach(shared.count) { number in
            ByteRange(shared[number] << clusterBits, geometry.clusterSize)
        } _: { number, memory, error throws(BlockError) in
            if let error { throw error }
            let looks = self.appraise(memory)
            let isStranger =
                active.contains(shared[number])
                ? looks.faultyCount > looks.soundCount
                : looks.faultyCount + looks.farCount > 0
            if isStranger { result.insert(shared[number]) }
        }
        return result
    }

    // MARK: Lengths

    /// A table that is said to be longer than its disk needs.
    private struct Claim {
        /// Of a snapshot; -1 for the active L1 table.
        var number: Int
        var claimed: Int
        /// As many entries as the clusters have that the disk needs.
        var kept: Int
        /// The clusters beyond those.
        var extra: Range<Int>
        var isTaken = false
    }

    private func claim(
        _ number: Int, _ offset: Int, _ claimed: Int, needed: Int
    ) -> Claim? {
        let all = clusters(offset, claimed * 8)
        let own = geometry.clusterCount(for: needed * 8)
        guard own < all.count else { return nil }
        return Claim(
            number: number, claimed: claimed, kept: own << (clusterBits - 3),
            extra: (all.lowerBound + own)..<all.upperBound)
    }

    /// Believes L1 tables that are longer than their disks need only where nothing else lies: beyond
    /// the disk there may be the state of a machine.
    func shortenClaims() async throws(BlockError) {
        var claims: [Claim] = []
        if let claim = claim(
            -1, header.l1Offset, header.l1EntryCount,
            needed: geometry.l1EntryCount(for: header.size))
        {
            claims.append(claim)
        }
        for (number, snapshot) in snapshots.enumerated() {
            if let claim = claim(
                number, snapshot.l1Offset, snapshot.l1EntryCount,
                needed: snapshot.neededEntryCount)
            {
                claims.append(claim)
            }
        }
        if claims.isEmpty { return }
        for claim in claims { setEntryCount(claim.number, claim.kept) }
        reports = false
        let end = geometry.clusterCount(for: fileSize)
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            for index in claims.indices {
                let extra = claims[index].extra
                if extra.upperBound > end || counts.isUsed(extra.clamped(to: counts.window)) {
                    claims[index].isTaken = true
                }
            }
        }
        reports = true
        for claim in claims { judge(claim) }
    }

    private func judge(_ claim: Claim) {
        guard claim.isTaken else {
            setEntryCount(claim.number, claim.claimed)
            return
        }
        let whose = claim.number < 0 ? "the disk" : "snapshot '\(snapshots[claim.number].name)'"
        lastingFault(
            "the L1 table of \(whose) is said to have \(claim.claimed) entries, which reach into "
                + "something else")
        if claim.number < 0 {
            headerIsWrong = true
        } else {
            rewritesSnapshotTable = true
        }
    }

    private func setEntryCount(_ number: Int, _ count: Int) {
        if number < 0 {
            header.l1EntryCount = count
            return
        }
        snapshots[number].l1EntryCount = count
        snapshots[number].entry.withUnsafeMutableBytes {
            $0.storeBigEndian(UInt32(count), at: 8)
        }
    }
}
