import BlockCore
import BlockGraph

// What the entries of one part of L2 tables refer to, on its way to the new file:
//
//     entries ──► items, each cluster once ──► read ──► zeroes found, compressed ──► placed, written
//
// Items are read in batches; the writes of one batch are in flight while the next one is read.

extension QCOW2Rewrite {
    /// What one batch holds in memory.
    static let batchBytesMax = 4 << 20
    static let batchItemCountMax = 256
    /// Of one read or write.
    static let requestBytesMax = 1 << 20

    /// A cluster that is referred to at one place of the disk.
    struct Item {
        enum Outcome {
            case zero
            /// Where it is in the new file.
            case stored(Int)
            case compressed(QCOW2.L2Entry)
        }

        /// Of the old file: a cluster's offset, or the whole entry of a compressed one.
        let old: QCOW2.L2Entry
        /// Its place in the disk, in bytes.
        let guest: Int
        /// L1 entries that lead to it.
        var references: UInt64
        /// Subclusters that some entry shows.
        var shown: UInt64
        /// Every entry shows all of them.
        var isWhole = true
        var outcome = Outcome.zero

        var isCompressed: Bool { old.isCompressed }
    }

    /// An entry of a table, and the item that it refers to.
    struct Cell {
        let table: Int
        let index: Int
        let item: Int
        let bitmap: UInt64
    }

    /// Copies what `old` refers to, whose first entry maps `guest`, and fills `new`.
    func copy(
        _ old: QCOW2TablePart, to new: QCOW2TablePart, _ tables: [Table], _ guest: Int
    ) async throws(BlockError) {
        var items: [Item] = []
        var cells: [Cell] = []
        var known: [UInt64: Int] = [:]
        for number in tables.indices { new.clear(number) }
        for index in 0..<old.entryCount {
            known.removeAll(keepingCapacity: true)
            for (number, table) in tables.enumerated() {
                let entry = old[number, index]
                guard entry.rawValue | entry.bitmap != 0 else { continue }
                guard let found = try referred(entry) else {
                    new[number, index] = kept(entry)
                    continue
                }
                let item = known[found.rawValue] ?? items.count
                known[found.rawValue] = item
                if item == items.count {
                    let place = guest + index << geometry.clusterBits
                    items.append(Item(old: found, guest: place, references: 0, shown: 0))
                }
                items[item].references += table.references
                items[item].shown |= Self.allocated(entry.bitmap)
                if entry.bitmap != QCOW2.L2Entry.allAllocated { items[item].isWhole = false }
                cells.append(
                    Cell(table: number, index: index, item: item, bitmap: entry.bitmap))
            }
        }
        try await copy(&items)
        for cell in cells {
            new[cell.table, cell.index] = self.entry(items[cell.item], cell.bitmap)
        }
    }

    /// Subclusters that have data: a zero bit goes before an allocated one.
    private static func allocated(_ bitmap: UInt64) -> UInt64 {
        bitmap & QCOW2.L2Entry.allAllocated & ~(bitmap >> 32)
    }

    /// The cluster that an entry needs; `nil` for entries that need none.
    private func referred(_ entry: QCOW2.L2Entry) throws(BlockError) -> QCOW2.L2Entry? {
        if source.hasDataFile { return nil }
        if entry.isCompressed {
            return QCOW2.L2Entry(rawValue: entry.rawValue & ~QCOW2.L2Entry.copiedFlag)
        }
        if geometry.hasSubclusters {
            guard entry.offset != 0, Self.allocated(entry.bitmap) != 0 else { return nil }
        } else {
            guard entry.kind(hasZeroFlag: source.hasZeroFlag) == .normal else { return nil }
        }
        guard entry.offset.isAligned(to: geometry.clusterSize) else {
            throw BlockError(
                .corrupt, "an L2 entry names \(entry.offset), which is no cluster",
                remedy: "check and repair the image", node: source.node.name)
        }
        return QCOW2.L2Entry(rawValue: UInt64(entry.offset))
    }

    /// What becomes of an entry that needs no cluster.
    private func kept(_ entry: QCOW2.L2Entry) -> QCOW2.L2Entry {
        if source.hasDataFile { return entry }
        if leavesZeroesOut { return QCOW2.L2Entry(rawValue: 0) }
        if geometry.hasSubclusters {
            return QCOW2.L2Entry(rawValue: 0, bitmap: entry.bitmap & QCOW2.L2Entry.allZero)
        }
        let kind = entry.kind(hasZeroFlag: source.hasZeroFlag)
        return QCOW2.L2Entry(
            rawValue: kind == .unallocated ? 0 : QCOW2.L2Entry.zeroFlag)
    }

    /// The entry that refers to an item which has its place.
    private func entry(_ item: Item, _ bitmap: UInt64) -> QCOW2.L2Entry {
        switch item.outcome {
        case .compressed(let entry): return entry
        case .stored(let host):
            let flag = item.references == 1 ? QCOW2.L2Entry.copiedFlag : 0
            return QCOW2.L2Entry(rawValue: UInt64(host) | flag, bitmap: bitmap)
        case .zero:
            if leavesZeroesOut { return QCOW2.L2Entry(rawValue: 0) }
            guard geometry.hasSubclusters else {
                return QCOW2.L2Entry.zero(hasSubclusters: false)
            }
            let zeroes = Self.allocated(bitmap) << 32 | bitmap & QCOW2.L2Entry.allZero
            return QCOW2.L2Entry(rawValue: 0, bitmap: zeroes)
        }
    }

    // MARK: Batches

    private func copy(_ items: inout [Item]) async throws(BlockError) {
        let most = max(
            1, min(Self.batchItemCountMax, Self.batchBytesMax >> geometry.clusterBits))
        var start = 0
        while start < items.count {
            let end = min(start + most, items.count)
            let batch = try QCOW2RewriteBatch(items[start..<end], self)
            try await batch.read()
            try await batch.transform()
            let outcomes = try batch.place()
            for (step, outcome) in outcomes.enumerated() { items[start + step].outcome = outcome }
            try await write(try await batch.output())
            start = end
        }
    }

    /// Starts the writes of a batch, once those of the one before have ended.
    private func write(_ output: [QCOW2RewriteBatch.Write]) async throws(BlockError) {
        try await writes.finish()
        writes = RequestLanes(on: source.node.seat)
        try await fresh.grow()
        for write in output {
            await writes.waitForRoom()
            await writes.start { [fresh] () throws(BlockError) in
                try await fresh.writeGrown(write.offset, from: write.vector)
            }
        }
    }
}
