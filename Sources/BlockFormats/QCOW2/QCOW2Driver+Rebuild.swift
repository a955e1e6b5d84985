import BlockCore
import BlockGraph

extension QCOW2Driver {
    /// Counts every reference in the image anew: after a crash with lazy refcounts.
    ///
    /// Nothing is in flight, and nothing is in the caches yet.
    func rebuildRefcounts() async throws(BlockError) {
        let bits = geometry.clusterBits
        let clusters = geometry.clusterCount(for: file.size)
        guard clusters <= QCOW2.Limit.rebuildClusterCountMax else {
            throw BlockError(
                .exhausted,
                "the image was not closed cleanly, and has too many clusters "
                    + "(\(clusters)) to count in memory", remedy: "repair it")
        }
        var counts = [UInt32](repeating: 0, count: clusters)
        let header = image.header
        try add(0, 1, to: &counts)
        try add(
            header.l1Offset >> bits, geometry.clusterCount(for: image.l1.count * 8), to: &counts)
        try add(header.refcountTableOffset >> bits, header.refcountTableClusters, to: &counts)
        for block in refcounts.blocks { try add(block >> bits, 1, to: &counts) }
        try await addTables(of: image.l1, to: &counts)
        try add(snapshotTable.offset >> bits, snapshotTable.count >> bits, to: &counts)
        for snapshot in snapshots {
            let clusters = geometry.clusterCount(for: snapshot.l1EntryCount * 8)
            try add(snapshot.l1Offset >> bits, clusters, to: &counts)
            try await addTables(of: try await readL1(of: snapshot), to: &counts)
        }
        try await refcounts.replaceAll(with: counts)
        try await refcounts.writeBlocks()
        try await file.flush()
        // What snapshots share has no COPIED flag, and what they do not share has one.
        image.l1 = try await changeReferences(of: image.l1, .flags)
        try await writeActiveL1()
        try await file.flush()
    }

    private func addTables(of l1: [UInt64], to counts: inout [UInt32]) async throws(BlockError) {
        for entry in l1 {
            let table = QCOW2.L1Entry(rawValue: entry).offset
            if table == 0 { continue }
            try add(table >> geometry.clusterBits, 1, to: &counts)
            try await addEntries(of: table, to: &counts)
        }
    }

    private func addEntries(of table: Int, to counts: inout [UInt32]) async throws(BlockError) {
        let bits = geometry.clusterBits
        let content = try IOVector(allocating: geometry.clusterSize)
        try await readFile(table, into: content)
        guard let bytes = content.single?.bytes else { return }
        for index in 0..<geometry.l2EntryCount {
            let raw: UInt64 = UnsafeRawBufferPointer(bytes).bigEndian(
                at: index << geometry.l2EntryShift)
            let entry = QCOW2.L2Entry(rawValue: raw)
            switch entry.kind(hasZeroFlag: hasZeroFlag) {
            case .unallocated, .zeroPlain: continue
            case .normal, .zeroAllocated: try add(entry.offset >> bits, 1, to: &counts)
            case .compressed:
                let place = QCOW2.CompressedDescriptor(entry, clusterBits: bits)
                let last = (place.offset + place.byteCount - 1) >> bits
                try add(place.offset >> bits, last - place.offset >> bits + 1, to: &counts)
            }
        }
    }

    private func add(
        _ first: Int, _ count: Int, to counts: inout [UInt32]
    ) throws(BlockError) {
        // A data cluster may end past a file that was cut at its last byte.
        let end = first + count
        guard first < end else { return }
        if end > counts.count {
            guard end <= QCOW2.Limit.rebuildClusterCountMax, end - counts.count <= 1 << 20 else {
                throw BlockError(
                    .corrupt, "a table names cluster \(first), far past the end of the file",
                    remedy: "repair the image")
            }
            counts.append(contentsOf: [UInt32](repeating: 0, count: end - counts.count))
        }
        for cluster in first..<end {
            guard let count = counts[cluster].adding(1) else {
                throw BlockError(.corrupt, "cluster \(cluster) has too many references")
            }
            counts[cluster] = count
        }
    }
}
