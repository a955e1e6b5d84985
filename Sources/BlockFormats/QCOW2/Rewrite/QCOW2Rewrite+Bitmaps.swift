import BlockCore
import BlockGraph

// Stored dirty bitmaps in a new image: entry by entry, flags and all, those that are inconsistent
// included. Clusters of bits that are all alike need no cluster.

extension QCOW2Rewrite {
    /// Writes all bitmaps and their directory, and says where it is.
    func writeBitmaps(_ header: inout QCOW2.Header) async throws(BlockError) {
        let type = QCOW2.HeaderExtension.bitmaps
        var entries = source.bitmaps.entries
        guard !entries.isEmpty,
            let index = header.extensions.firstIndex(where: { $0.type == type })
        else {
            // Nobody knows any more what an unused directory says.
            header.extensions.removeAll { $0.type == type }
            header.autoclear.remove(.bitmaps)
            return
        }
        for index in entries.indices { try await writeBitmap(&entries[index]) }
        let bytes = QCOW2.BitmapEntry.serialise(entries)
        let host = try fresh.take(geometry.clusterCount(for: bytes.count))
        try await fresh.write(host, from: try QCOW2Image.vector(bytes))
        header.extensions[index].data =
            QCOW2.BitmapsExtension(
                count: entries.count, directoryBytes: bytes.count, directoryOffset: host
            ).serialised
    }

    private func writeBitmap(_ entry: inout QCOW2.BitmapEntry) async throws(BlockError) {
        guard entry.type == QCOW2.BitmapEntry.dirtyTracking else {
            throw BlockError(
                .unsupported,
                "the image has a bitmap '\(QCOW2Check.printable(entry.name))' of a type that is not "
                    + "known", remedy: "remove it with 'bitmap --remove'", node: source.node.name)
        }
        var table = try await source.bitmapTable(entry)
        for index in table.indices {
            let old = QCOW2.BitmapTableEntry(rawValue: table[index])
            guard old.offset != 0 else { continue }
            table[index] = try await writeBits(old)
        }
        entry.tableOffset = try fresh.take(geometry.clusterCount(for: table.count * 8))
        try await fresh.write(entry.tableOffset, table)
    }

    /// - Returns: the entry of a new table for a cluster of bits.
    private func writeBits(_ old: QCOW2.BitmapTableEntry) async throws(BlockError) -> UInt64 {
        let bits = try IOVector(allocating: geometry.clusterSize)
        try await source.readFile(old.offset, into: bits)
        if bits.isZero { return QCOW2.BitmapTableEntry.allZeroes.rawValue }
        let host = try fresh.take(1)
        try await fresh.write(host, from: bits)
        return UInt64(host)
    }
}

extension QCOW2Driver {
    /// The table of a stored bitmap.
    ///
    /// - Throws: `corrupt` for entries that mean nothing.
    func bitmapTable(_ entry: QCOW2.BitmapEntry) async throws(BlockError) -> [UInt64] {
        let end = entry.tableOffset + entry.tableCount * 8
        let table =
            end > file.size
            ? [] : try await Self.readTable(file, entry.tableOffset, entry.tableCount)
        let areValid = table.allSatisfy {
            QCOW2.BitmapTableEntry(rawValue: $0).isValid(
                clusterSize: geometry.clusterSize, fileSize: file.size)
        }
        guard end <= file.size, areValid else {
            throw BlockError(
                .corrupt,
                "the table of the bitmap '\(QCOW2Check.printable(entry.name))' is damaged",
                remedy: "check and repair the image", node: node.name)
        }
        return table
    }
}
