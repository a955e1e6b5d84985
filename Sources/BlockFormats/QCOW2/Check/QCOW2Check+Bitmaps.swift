import BlockCore

// Persistent dirty bitmaps (§Bitmaps extension, §Bitmap directory, §Bitmap table).
//
// Entries are read as ``QCOW2/BitmapEntry`` is, and judged one by one: what is broken goes, the rest stays.

extension QCOW2Check {
    private static let tableChunkBytes = 256 << 10
    /// Bits 1–8 and 56–63 of an entry of a bitmap table.
    private static let entryReservedMask: UInt64 = 0xff00_0000_0000_01fe

    /// Reads the directory and finds what is wrong with the bitmaps. A repair leaves broken ones out.
    func readBitmaps() async throws(BlockError) {
        guard header.hasBitmaps,
            let data = header.extensions.first(where: {
                $0.type == QCOW2.HeaderExtension.bitmaps
            })?.data
        else { return }
        guard let (count, directory) = bitmapDirectory(data),
            let entries = try await directoryEntries(directory, count)
        else {
            corruption("the bitmaps are dropped: their directory is broken", mended: true)
            bitmaps.isChanged = true
            return
        }
        bitmaps.directory = directory
        var names: Set<[UInt8]> = []
        for entry in entries {
            var fault = try await fault(of: entry)
            if !names.insert(entry.name).inserted { fault = fault ?? "another one has its name" }
            if let fault {
                corruption(
                    "bitmap '\(Self.printable(entry.name))' is broken: \(fault)", mended: true)
                if mendsErrors { continue }
            }
            bitmaps.entries.append(entry)
        }
        if bitmaps.entries.count < entries.count { bitmapsHaveChanged() }
    }

    /// Some are left out.
    func bitmapsHaveChanged() {
        guard let directory = bitmaps.directory, !bitmaps.entries.isEmpty else {
            bitmaps = Bitmaps(isChanged: true)
            return
        }
        let count = bitmaps.entries.reduce(0) { $0 + $1.length }
        bitmaps.directory = ByteRange(directory.offset, count)
        bitmaps.isChanged = true
    }

    private func bitmapDirectory(_ data: [UInt8]) -> (count: Int, ByteRange)? {
        guard
            let place = try? QCOW2.BitmapsExtension(
                parsing: data, clusterSize: geometry.clusterSize),
            let range = ByteRange(
                checking: UInt64(place.directoryOffset), count: place.directoryBytes),
            range.end <= fileSize
        else { return nil }
        return (place.count, range)
    }

    private func directoryEntries(
        _ range: ByteRange, _ count: Int
    ) async throws(BlockError) -> [QCOW2.BitmapEntry]? {
        let memory = try await read(range.offset, range.count)
        let entries = QCOW2.BitmapEntry.split(UnsafeRawBufferPointer(memory.bytes))
        return entries?.count == count ? entries : nil
    }

    /// The place of an entry's table, if a file can have it.
    func table(of entry: QCOW2.BitmapEntry) -> ByteRange? {
        guard entry.tableOffset > 0, entry.tableCount > 0,
            entry.tableOffset < QCOW2.Limit.hostOffsetMax
        else { return nil }
        return ByteRange(entry.tableOffset, entry.tableCount * 8)
    }

    /// What is wrong with a bitmap, if anything is.
    private func fault(of entry: QCOW2.BitmapEntry) async throws(BlockError) -> String? {
        if entry.type != QCOW2.BitmapEntry.dirtyTracking { return "its type is \(entry.type)" }
        if let fault = entry.fault(clusterSize: geometry.clusterSize) { return fault }
        guard let table = table(of: entry), table.end - fileSize < geometry.clusterSize else {
            return "its table is nowhere in the file"
        }
        // One that was in use when its program died may have the size of before.
        let needed = tableEntryCount(entry.granularityBits)
        if !entry.flags.contains(.inUse), entry.tableCount != needed {
            return "its table has \(entry.tableCount) entries, the disk needs \(needed)"
        }
        var result: String?
        try await forEachBitmapEntry(table) { raw in
            if result == nil { result = self.fault(of: raw) }
        }
        return result
    }

    /// The entries of the table of a bitmap with a bit for each `1 << granularity` bytes of the disk.
    private func tableEntryCount(_ granularity: Int) -> Int {
        let bits = header.size == 0 ? 0 : (header.size - 1) >> granularity + 1
        return QCOW2.bitmapTableCount(bitCount: bits, clusterSize: geometry.clusterSize)
    }

    private func fault(of raw: UInt64) -> String? {
        let offset = raw & QCOW2.L1Entry.offsetMask
        if raw & Self.entryReservedMask != 0 || (offset != 0 && raw & 1 != 0) {
            return "an entry of its table is \(hex(raw))"
        }
        if !Int(offset).isAligned(to: geometry.clusterSize) {
            return "a part of it is at \(offset), which is no cluster"
        }
        if Int(offset) >= offsetEnd { return "a part of it lies past the end of the file" }
        return nil
    }

    private func forEachBitmapEntry(
        _ table: ByteRange, _ body: (UInt64) -> Void
    ) async throws(BlockError) {
        let there = min(table.count, max(0, fileSize - table.offset))
        let chunks = (there + Self.tableChunkBytes - 1) / Self.tableChunkBytes
        try await readEach(chunks) { number in
            let start = number * Self.tableChunkBytes
            return ByteRange(
                table.offset + start, min(Self.tableChunkBytes, table.count - start))
        } _: { _, memory, error throws(BlockError) in
            if let error {
                self.failure("a bitmap's table", error)
                return
            }
            let bytes = UnsafeRawBufferPointer(memory.bytes)
            for index in 0..<(bytes.count / 8) {
                let raw: UInt64 = bytes.bigEndian(at: index * 8)
                if raw != 0 { body(raw) }
            }
        }
    }

    func countBitmaps(_ counts: QCOW2ReferenceCounts) async throws(BlockError) {
        guard let directory = bitmaps.directory else { return }
        region(directory.offset, directory.count, "the bitmaps' directory", counts)
        for entry in bitmaps.entries {
            guard let table = table(of: entry),
                region(table.offset, table.count, "a bitmap's table", counts)
            else { continue }
            try await forEachBitmapCluster(table) { counts.add($0, 1, .plain) }
        }
    }

    /// The clusters that the sound entries of a table name.
    func forEachBitmapCluster(
        _ table: ByteRange, _ body: (Int) -> Void
    ) async throws(BlockError) {
        try await forEachBitmapEntry(table) { raw in
            let offset = Int(raw & QCOW2.L1Entry.offsetMask)
            if offset != 0, self.fault(of: raw) == nil { body(offset >> self.clusterBits) }
        }
    }

    // MARK: Repair

    /// Writes a directory of fewer bitmaps in the place of the old one. While it is written there are no
    /// bitmaps: without their feature bit they are nobody's.
    func mendBitmaps() async throws(BlockError) {
        guard bitmaps.isChanged else { return }
        bitmaps.isChanged = false
        header.autoclear.remove(.bitmaps)
        try await patchHeader()
        guard let directory = bitmaps.directory, let place = try await bitmapExtensionOffset()
        else { return }
        try await write(QCOW2.BitmapEntry.serialise(bitmaps.entries), at: directory.offset)
        let fields = try await read(place, 16)
        fields.bytes.storeBigEndian(UInt32(bitmaps.entries.count), at: 0)
        fields.bytes.storeBigEndian(UInt64(directory.count), at: 8)
        try await file.write(place, from: IOVector(fields))
        try await file.flush()
        header.autoclear.insert(.bitmaps)
        try await patchHeader()
    }

    /// Where the data of the bitmaps' header extension is.
    private func bitmapExtensionOffset() async throws(BlockError) -> Int? {
        let memory = try await read(0, min(geometry.clusterSize, 1 << 16))
        let bytes = UnsafeRawBufferPointer(memory.bytes)
        var offset = Int(bytes.bigEndian(at: 100, as: UInt32.self))
        while bytes.count - offset >= 8 {
            let type: UInt32 = bytes.bigEndian(at: offset)
            let length = Int(bytes.bigEndian(at: offset + 4, as: UInt32.self))
            if type == QCOW2.HeaderExtension.bitmaps {
                return length >= 24 && bytes.count - offset >= 32 ? offset + 8 : nil
            }
            if type == 0 { return nil }
            offset += 8 + (length + 7) & ~7
        }
        return nil
    }
}
