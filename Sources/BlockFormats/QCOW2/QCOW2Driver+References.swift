import BlockCore
import BlockGraph

// Walks over all that an L1 table refers to, for snapshots. Nothing is in flight on the node, and no
// slice of an L2 table is in memory.

extension QCOW2 {
    /// What an L2 table refers to in the file.
    struct TableReferences {
        /// Clusters that follow each other, and the entries that name them.
        struct Run: Equatable {
            /// The first of the entries; `nil` for a compressed cluster: its clusters are shared.
            var entry: Int?
            var first: Int
            var count: Int
        }

        private(set) var runs: [Run] = []

        /// - Throws: `corrupt` for an entry that names no cluster.
        init(
            of table: UnsafeRawBufferPointer, _ geometry: Geometry, hasZeroFlag: Bool
        ) throws(BlockError) {
            let bits = geometry.clusterBits
            for index in 0..<geometry.l2EntryCount {
                let entry = L2Entry(rawValue: table.bigEndian(at: index << geometry.l2EntryShift))
                switch entry.kind(hasZeroFlag: hasZeroFlag) {
                case .unallocated, .zeroPlain: continue
                case .normal, .zeroAllocated:
                    guard entry.offset.isAligned(to: geometry.clusterSize) else {
                        throw BlockError(
                            .corrupt, "an L2 entry names \(entry.offset), which is no cluster",
                            remedy: "repair the image")
                    }
                    add(index, entry.offset >> bits)
                case .compressed:
                    let place = CompressedDescriptor(entry, clusterBits: bits)
                    let first = place.offset >> bits
                    let last = (place.offset + place.byteCount - 1) >> bits
                    runs.append(Run(entry: nil, first: first, count: last - first + 1))
                }
            }
        }

        private mutating func add(_ index: Int, _ cluster: Int) {
            if let last = runs.last, let entry = last.entry, entry + last.count == index,
                last.first + last.count == cluster
            {
                runs[runs.count - 1].count += 1
            } else {
                runs.append(Run(entry: index, first: cluster, count: 1))
            }
        }
    }
}

extension QCOW2Driver {
    /// What becomes of the references of an L1 table.
    enum ReferenceChange {
        /// Each counts once more.
        case retain
        /// Each counts once less; what nothing uses any more is discarded below, if that is wanted.
        case release(discards: Bool)
        /// They stay, but the COPIED flags are made right.
        case flags
    }

    /// L2 tables that are read at once.
    private static let tablesAtOnce = 8

    /// Changes the counts of all that `l1` refers to, and with ``ReferenceChange/retain`` and
    /// ``ReferenceChange/flags`` the COPIED flags in its L2 tables on disk.
    ///
    /// - Returns: the L1 table with the right COPIED flags.
    /// - Throws: after a failed ``ReferenceChange/retain`` the counts are as before, as far as they
    ///   could be taken back.
    func changeReferences(
        of l1: [UInt64], _ change: ReferenceChange
    ) async throws(BlockError) -> [UInt64] {
        let indices = l1.indices.filter { QCOW2.L1Entry(rawValue: l1[$0]).offset != 0 }
        var result = l1
        var done = 0
        do throws(BlockError) {
            while done < indices.count {
                let group = indices[done..<min(done + Self.tablesAtOnce, indices.count)]
                let offsets = group.map { QCOW2.L1Entry(rawValue: l1[$0]).offset }
                let tables = try await readTables(offsets)
                for (index, (offset, table)) in zip(group, zip(offsets, tables)) {
                    let isCopied = try await changeTable(table, at: offset, change)
                    result[index] =
                        UInt64(offset) | (isCopied ? QCOW2.L1Entry.copiedFlag : 0)
                    done += 1
                }
            }
        } catch {
            if case .retain = change { await takeBack(l1, Array(indices[..<done])) }
            throw error
        }
        return result
    }

    private func takeBack(_ l1: [UInt64], _ indices: [Int]) async {
        for index in indices {
            let offset = QCOW2.L1Entry(rawValue: l1[index]).offset
            guard let table = try? await readTables([offset]).first else { continue }
            // What cannot be taken back leaks.
            _ = try? await changeTable(table, at: offset, .release(discards: false))
        }
    }

    private func readTables(_ offsets: [Int]) async throws(BlockError) -> [IOSlice] {
        let lanes = RequestLanes(on: node.seat)
        var tables: [IOSlice] = []
        do throws(BlockError) {
            for offset in offsets {
                guard offset.isAligned(to: geometry.clusterSize) else {
                    throw await image.corruption("an L2 table is at \(offset), which is no cluster")
                }
                let memory = try IOBuffer(count: geometry.clusterSize).prefix(geometry.clusterSize)
                tables.append(memory)
                await lanes.start { () throws(BlockError) in
                    try await self.readFile(offset, into: IOVector(memory))
                }
            }
        } catch {
            try? await lanes.finish()
            throw error
        }
        try await lanes.finish()
        return tables
    }

    /// - Returns: whether nothing else uses the table.
    private func changeTable(
        _ table: IOSlice, at offset: Int, _ change: ReferenceChange
    ) async throws(BlockError) -> Bool {
        let references = try QCOW2.TableReferences(
            of: UnsafeRawBufferPointer(table.bytes), geometry, hasZeroFlag: hasZeroFlag)
        let own = QCOW2.TableReferences.Run(
            entry: nil, first: offset >> geometry.clusterBits, count: 1)
        switch change {
        case .retain:
            let runs = references.runs + [own]
            try await retain(runs)
            do throws(BlockError) {
                try await fixFlags(table, at: offset, references.runs)
            } catch {
                for run in runs { try? await refcounts.release(run.first, run.count) }
                throw error
            }
        case .release(let discards):
            for run in references.runs + [own] {
                if discards {
                    try await discardBelow(
                        Removal(first: run.first, count: run.count, discards: true))
                }
                try await refcounts.release(run.first, run.count)
            }
            return false
        case .flags:
            try await fixFlags(table, at: offset, references.runs)
        }
        return try await refcounts.count(of: own.first) == 1
    }

    private func retain(_ runs: [QCOW2.TableReferences.Run]) async throws(BlockError) {
        var done = 0
        do throws(BlockError) {
            while done < runs.count {
                try await refcounts.retain(runs[done].first, runs[done].count)
                done += 1
            }
        } catch {
            for run in runs[..<done] { try? await refcounts.release(run.first, run.count) }
            throw error
        }
    }

    /// An entry has its COPIED flag exactly when the count of its cluster is one.
    private func fixFlags(
        _ table: IOSlice, at offset: Int, _ runs: [QCOW2.TableReferences.Run]
    ) async throws(BlockError) {
        let bytes = table.bytes
        let shift = geometry.l2EntryShift
        var isChanged = false
        for run in runs {
            guard let entry = run.entry else { continue }
            try await refcounts.visit(run.first, run.count) { cluster, value in
                let place = (entry + cluster - run.first) << shift
                let old = UnsafeRawBufferPointer(bytes).bigEndian(at: place, as: UInt64.self)
                let flag = value == 1 ? QCOW2.L2Entry.copiedFlag : 0
                let new = old & ~QCOW2.L2Entry.copiedFlag | flag
                if new != old {
                    bytes.storeBigEndian(new, at: place)
                    isChanged = true
                }
            }
        }
        guard isChanged else { return }
        if let name = image.fixedOverlap(offset, table.count) {
            throw await image.corruption("an L2 table at \(offset) lies over the \(name)")
        }
        try await file.write(offset, from: IOVector(table))
    }
}
