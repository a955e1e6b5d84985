import BlockCore

// Persistent dirty bitmaps (§Bitmaps extension, §Bitmap directory, §Bitmap table).
//
// extension   0 bitmaps     4 reserved        8 directory size   16 directory offset
// directory   0 table offset   8 table entries   12 flags   16 type   17 granularity (log2)
//            18 name length   20 length of extra data   24 extra data, name, padding to 8 bytes
// table      offsets of clusters; 0 or 1 where all bits are clear or set

extension QCOW2Check {
    private static let directoryBytesMax = 64 << 20
    private static let fixedBytes = 24
    private static let tableEntryCountMax = 0x800_0000
    private static let bitmapBytesMax = 512 << 20
    private static let inUseFlag: UInt32 = 1
    private static let tableChunkBytes = 256 << 10
    /// Bits 1–8 and 56–63 of an entry of a bitmap table.
    private static let entryReservedMask: UInt64 = 0xff00_0000_0000_01fe

    private struct DirectoryEntry {
        var raw: [UInt8]
        var name: String
        var table: ByteRange?
    }

    /// Reads the directory and finds what is wrong with the bitmaps. With repair, broken ones go.
    func readBitmaps() async throws(BlockError) {
        guard header.hasBitmaps,
            let data = header.extensions.first(where: {
                $0.type == QCOW2.HeaderExtension.bitmaps
            })?.data
        else { return }
        guard let (count, directory) = bitmapDirectory(data),
            let entries = try await directoryEntries(directory, count)
        else {
            corruption(
                mendsErrors
                    ? "the bitmaps are dropped: their directory is broken"
                    : "the bitmaps' directory is broken", mended: mendsErrors)
            if mendsErrors { try await dropAllBitmaps() }
            return
        }
        bitmaps.directory = directory
        var kept: [DirectoryEntry] = []
        for entry in entries {
            if let fault = try await fault(of: entry) {
                corruption("bitmap '\(entry.name)' is broken: \(fault)", mended: mendsErrors)
                if mendsErrors { continue }
            }
            kept.append(entry)
            if let table = entry.table, table.count > 0 { bitmaps.tables.append(table) }
        }
        if kept.count < entries.count { try await rewriteDirectory(directory, kept) }
    }

    private func bitmapDirectory(_ data: [UInt8]) -> (count: Int, ByteRange)? {
        guard data.count >= 24 else { return nil }
        let (count, size, offset) = data.withUnsafeBytes { bytes in
            (
                Int(bytes.bigEndian(at: 0, as: UInt32.self)),
                bytes.bigEndian(at: 8, as: UInt64.self), bytes.bigEndian(at: 16, as: UInt64.self)
            )
        }
        guard let range = ByteRange(checking: offset, count: size), range.offset > 0,
            range.offset.isAligned(to: geometry.clusterSize), range.end <= fileSize,
            range.count <= Self.directoryBytesMax, count > 0
        else { return nil }
        return (count, range)
    }

    private func directoryEntries(
        _ range: ByteRange, _ count: Int
    ) async throws(BlockError) -> [DirectoryEntry]? {
        let memory = try await read(range.offset, range.count)
        let bytes = UnsafeRawBufferPointer(memory.bytes)
        var entries: [DirectoryEntry] = []
        var position = 0
        while position < bytes.count {
            guard bytes.count - position >= Self.fixedBytes else { return nil }
            let nameLength = Int(bytes.bigEndian(at: position + 18, as: UInt16.self))
            let extraLength = Int(bytes.bigEndian(at: position + 20, as: UInt32.self))
            let length = (Self.fixedBytes + nameLength + extraLength + 7) & ~7
            guard length <= bytes.count - position else { return nil }
            let name = position + Self.fixedBytes + extraLength
            let tableCount = Int(bytes.bigEndian(at: position + 8, as: UInt32.self))
            entries.append(
                DirectoryEntry(
                    raw: Array(bytes[position..<(position + length)]),
                    name: Self.printable(bytes[name..<(name + nameLength)]),
                    table: ByteRange(
                        checking: bytes.bigEndian(at: position, as: UInt64.self),
                        count: tableCount * 8)))
            position += length
        }
        return entries.count == count ? entries : nil
    }

    /// What is wrong with a bitmap, if anything is.
    private func fault(of entry: DirectoryEntry) async throws(BlockError) -> String? {
        let (flags, type, granularity) = entry.raw.withUnsafeBytes { bytes in
            (bytes.bigEndian(at: 12, as: UInt32.self), bytes[16], bytes[17])
        }
        if type != 1 { return "its type is \(type)" }
        if flags & ~7 != 0 { return "it has flags that are not known" }
        if granularity < 9 || granularity > 31 { return "its granularity is 2^\(granularity)" }
        if entry.name.isEmpty { return "it has no name" }
        guard let table = entry.table, table.count <= Self.tableEntryCountMax * 8,
            table.offset.isAligned(to: geometry.clusterSize),
            table.end - fileSize < geometry.clusterSize, table.count > 0, table.offset > 0,
            (table.count / 8) << clusterBits <= Self.bitmapBytesMax
        else { return "its table is nowhere in the file" }
        // One that was in use when its program died may have the size of before.
        if flags & Self.inUseFlag == 0, table.count / 8 != tableEntryCount(granularity) {
            return "its table has \(table.count / 8) entries, the disk needs "
                + "\(tableEntryCount(granularity))"
        }
        var result: String?
        try await forEachBitmapEntry(table) { raw in
            if result == nil { result = self.fault(of: raw) }
        }
        return result
    }

    /// The entries of the table of a bitmap with a bit for each `1 << granularity` bytes of the disk.
    private func tableEntryCount(_ granularity: UInt8) -> Int {
        let bits = header.size == 0 ? 0 : (header.size - 1) >> Int(granularity) + 1
        return geometry.clusterCount(for: (bits / 64 + (bits % 64 == 0 ? 0 : 1)) * 8)
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
        for table in bitmaps.tables {
            guard region(table.offset, table.count, "a bitmap's table", counts) else { continue }
            try await forEachBitmapEntry(table) { raw in
                let offset = Int(raw & QCOW2.L1Entry.offsetMask)
                guard offset != 0, self.fault(of: raw) == nil else { return }
                counts.add(offset >> self.clusterBits, 1, .plain)
            }
        }
    }

    // MARK: Repair

    /// Without their feature bit the bitmaps are nobody's.
    private func dropAllBitmaps() async throws(BlockError) {
        header.autoclear.remove(.bitmaps)
        try await patchHeader()
        bitmaps = Bitmaps()
    }

    /// Writes a directory of fewer bitmaps in the place of the old one. While it is written there
    /// are no bitmaps.
    private func rewriteDirectory(
        _ old: ByteRange, _ kept: [DirectoryEntry]
    ) async throws(BlockError) {
        let remaining = bitmaps.tables
        try await dropAllBitmaps()
        guard !kept.isEmpty, let place = try await bitmapExtensionOffset() else { return }
        let bytes = kept.flatMap(\.raw)
        try await write(bytes, at: old.offset)
        let fields = try await read(place, 16)
        fields.bytes.storeBigEndian(UInt32(kept.count), at: 0)
        fields.bytes.storeBigEndian(UInt64(bytes.count), at: 8)
        try await file.write(place, from: IOVector(fields))
        try await file.flush()
        header.autoclear.insert(.bitmaps)
        try await patchHeader()
        bitmaps = Bitmaps(directory: ByteRange(old.offset, bytes.count), tables: remaining)
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
