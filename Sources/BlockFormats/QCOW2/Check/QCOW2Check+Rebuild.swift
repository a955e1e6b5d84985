import BlockCore

// New refcount structures, where the old ones cannot be mended.

extension QCOW2Check {
    /// Where everything new goes: past all that is referred to.
    ///
    /// ```
    /// … all that is in use │ L1 table │ snapshot table │ refcount blocks │ refcount table │
    ///                      first                        blocksFirst                       end
    /// ```
    /// All of it has refcount 1, and nothing of it is referred to before the header names it.
    private struct Layout {
        var first: Int
        var l1: Int
        var snapshotTable: Int
        var blocksFirst: Int
        /// Indices in the refcount table, in order.
        var blocks: [Int]
        var tableFirst: Int
        var tableClusters: Int
        var end: Int { tableFirst + tableClusters }
    }

    func rebuild() async throws(BlockError) {
        var used = Set<Int>()
        let bits = geometry.refcountBlockBits
        try await forEachWindow(withRefcounts: false) { counts throws(BlockError) in
            used.formUnion(counts.blocksInUse(bits))
        }
        let layout = try layout(used)
        try await grow(to: layout.end << clusterBits)
        if movesL1 { try await copyL1(to: layout.l1 << clusterBits) }
        if let table = newSnapshotTable, !table.isEmpty {
            try await write(table, at: layout.snapshotTable << clusterBits)
        }
        try await forEachWindow(withRefcounts: false) { counts throws(BlockError) in
            for (number, index) in layout.blocks.enumerated() {
                try await self.writeBlock(
                    index, at: (layout.blocksFirst + number) << self.clusterBits, counts, layout)
            }
        }
        var table = [UInt64](
            repeating: 0, count: layout.tableClusters << (clusterBits - 3))
        for (number, index) in layout.blocks.enumerated() {
            table[index] = UInt64((layout.blocksFirst + number) << clusterBits)
        }
        try await write(
            QCOW2Refcounts.bigEndian(table[...]), at: layout.tableFirst << clusterBits)
        try await file.flush()
        try await switchOver(to: layout, table)
    }

    private func switchOver(to layout: Layout, _ table: [UInt64]) async throws(BlockError) {
        header.refcountTableOffset = layout.tableFirst << clusterBits
        header.refcountTableClusters = layout.tableClusters
        if movesL1 { header.l1Offset = layout.l1 << clusterBits }
        if let newSnapshotTable {
            header.snapshotCount = snapshots.count
            header.snapshotsOffset =
                newSnapshotTable.isEmpty ? 0 : layout.snapshotTable << clusterBits
            snapshotTableBytes = newSnapshotTable.count
        }
        willSwitch()
        try await patchHeader()
        refcountTable = table
        movesL1 = false
        rewritesSnapshotTable = false
        usedEnd = layout.end
        fileSize = file.size
    }

    private func layout(_ used: Set<Int>) throws(BlockError) -> Layout {
        let bits = geometry.refcountBlockBits
        // Structures that are about to go are still the image's until the header has changed.
        var first = highestReferenced + 1
        for (offset, count) in [
            (header.l1Offset, header.l1EntryCount * 8),
            (header.snapshotsOffset, header.snapshotCount > 0 ? snapshotTableBytes : 0),
            (header.refcountTableOffset, header.refcountTableClusters << clusterBits),
        ] where count > 0 && offset < fileSize {
            first = max(first, geometry.clusterCount(for: min(offset + count, fileSize)))
        }
        for index in refcountTable.indices {
            if let block = refcountBlock(index) { first = max(first, block >> clusterBits + 1) }
        }
        let snapshotTable = first + (movesL1 ? l1ClusterCount : 0)
        let blocksFirst =
            snapshotTable + geometry.clusterCount(for: newSnapshotTable?.count ?? 0)
        var blocks = used
        var tableClusters = 1
        while true {
            let end = blocksFirst + blocks.count + tableClusters
            var larger = blocks
            // The new structures count themselves.
            for index in (first >> bits)...((end - 1) >> bits) { larger.insert(index) }
            let neededTable = geometry.clusterCount(for: ((larger.max() ?? 0) + 1) * 8)
            if larger.count == blocks.count, neededTable <= tableClusters { break }
            blocks = larger
            tableClusters = max(tableClusters, neededTable)
            guard
                tableClusters << clusterBits
                    <= max(
                        QCOW2.Limit.refcountTableBytesMax, geometry.clusterSize)
            else {
                throw BlockError(
                    .noSpace, "the image has no room for a new refcount table",
                    remedy: "copy its data to an image with larger clusters")
            }
        }
        return Layout(
            first: first, l1: first, snapshotTable: snapshotTable, blocksFirst: blocksFirst,
            blocks: blocks.sorted(), tableFirst: blocksFirst + blocks.count,
            tableClusters: tableClusters)
    }

    /// Writes the part of a refcount block that the window of `counts` knows.
    private func writeBlock(
        _ index: Int, at host: Int, _ counts: QCOW2ReferenceCounts, _ layout: Layout
    ) async throws(BlockError) {
        let bits = geometry.refcountBlockBits
        let covered = index << bits..<(index + 1) << bits
        let range = covered.clamped(to: counts.window)
        if range.isEmpty { return }
        let order = geometry.refcountOrder
        // Windows end at whole pages, which take whole sectors of a block.
        let start = ((range.lowerBound - covered.lowerBound) << order) >> 3
        let end = ((range.upperBound - covered.lowerBound) << order) >> 3
        let memory = try IOBuffer(count: end - start).prefix(end - start)
        memory.bytes.initializeMemory(as: UInt8.self, repeating: 0)
        func set(_ cluster: Int, _ count: UInt64) {
            QCOW2.Refcount.set(
                memory.bytes, cluster - range.lowerBound, to: min(count, geometry.refcountMax),
                order: order)
        }
        var rest = range
        while let cluster = counts.firstUsed(in: rest) {
            set(cluster, counts.count(of: cluster))
            rest = (cluster + 1)..<range.upperBound
        }
        for cluster in range.clamped(to: layout.first..<layout.end) { set(cluster, 1) }
        try await file.write(host + start, from: IOVector(memory))
    }

    private func copyL1(to host: Int) async throws(BlockError) {
        let total = l1ClusterCount << clusterBits
        let count = header.l1EntryCount * 8
        var done = 0
        while done < total {
            let memory = try await read(header.l1Offset + done, min(1 << 20, total - done))
            let past = max(0, done + memory.count - count)
            IOVector(memory).zero(memory.count - min(past, memory.count), min(past, memory.count))
            try await file.write(host + done, from: IOVector(memory))
            done += memory.count
        }
    }
}
