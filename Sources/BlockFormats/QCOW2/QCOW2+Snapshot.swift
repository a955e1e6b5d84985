import BlockCore

extension QCOW2 {
    /// An entry of the snapshot table (§Snapshots).
    ///
    /// ```
    ///  0 L1 offset     8 L1 entries   12 id length   14 name length   16 seconds  20 nanoseconds
    /// 24 VM clock     32 VM state     36 extra data length            40 extra data, id, name
    /// ```
    /// Extra data: VM state size in 64 bits, disk size, instruction count; what follows is kept as it
    /// is. Entries are padded to 8 bytes.
    struct Snapshot: Equatable, Sendable {
        static let fixedLength = 40
        static let extraLength = 24

        var l1Offset = 0
        var l1EntryCount = 0
        var seconds: UInt32 = 0
        var nanoseconds: UInt32 = 0
        var vmClock: UInt64 = 0
        /// The field of 32 bits; `vmStateSize` is the one to use.
        var shortVMStateSize: UInt32 = 0
        var extra: [UInt8] = []
        var identifier: [UInt8] = []
        var name: [UInt8] = []

        /// The saved state of the virtual machine, in bytes.
        var vmStateSize: UInt64 {
            extraField(0) ?? UInt64(shortVMStateSize)
        }
        /// The disk's size in bytes; `nil` where the entry does not say: the image's.
        var diskSize: UInt64? { extraField(8) }
        /// `nil` where it is not recorded.
        var instructionCount: UInt64? { extraField(16).flatMap { $0 == .max ? nil : $0 } }

        private func extraField(_ offset: Int) -> UInt64? {
            guard extra.count >= offset + 8 else { return nil }
            return extra.withUnsafeBytes { $0.bigEndian(at: offset, as: UInt64.self) }
        }

        /// States the disk's size, where the entry leaves it to the image.
        mutating func stateDiskSize(_ size: Int) {
            guard diskSize == nil else { return }
            let state = vmStateSize
            extra.append(contentsOf: [UInt8](repeating: 0, count: 16 - extra.count))
            extra.withUnsafeMutableBytes {
                $0.storeBigEndian(state, at: 0)
                $0.storeBigEndian(UInt64(size), at: 8)
            }
        }
    }
}

extension QCOW2.Snapshot {
    /// What a parser of the table came to.
    enum ParsedTable: Equatable {
        case entries([QCOW2.Snapshot], byteCount: Int)
        /// The bytes end within an entry.
        case tooShort
    }

    /// Parses `count` entries.
    static func parseTable(
        _ bytes: UnsafeRawBufferPointer, count: Int, geometry: QCOW2.Geometry
    ) throws(BlockError) -> ParsedTable {
        var result: [QCOW2.Snapshot] = []
        var offset = 0
        for index in 0..<count {
            guard bytes.count - offset >= fixedLength else { return .tooShort }
            let extraLength = Int(bytes.bigEndian(at: offset + 36, as: UInt32.self))
            guard extraLength <= QCOW2.Limit.snapshotExtraBytesMax else {
                throw BlockError(
                    .corrupt,
                    "snapshot \(index) has \(extraLength) bytes of extra data, more than "
                        + "\(QCOW2.Limit.snapshotExtraBytesMax)", remedy: "repair the image")
            }
            let identifierLength = Int(bytes.bigEndian(at: offset + 12, as: UInt16.self))
            let nameLength = Int(bytes.bigEndian(at: offset + 14, as: UInt16.self))
            let length = fixedLength + extraLength + identifierLength + nameLength
            guard bytes.count - offset >= length else { return .tooShort }
            let entry = UnsafeRawBufferPointer(rebasing: bytes[offset..<(offset + length)])
            result.append(
                try QCOW2.Snapshot(
                    parsing: entry, extraLength, identifierLength, index, geometry))
            offset += (length + 7) & ~7
        }
        return .entries(result, byteCount: min(offset, bytes.count))
    }

    private init(
        parsing bytes: UnsafeRawBufferPointer, _ extraLength: Int, _ identifierLength: Int,
        _ index: Int, _ geometry: QCOW2.Geometry
    ) throws(BlockError) {
        let offset: UInt64 = bytes.bigEndian(at: 0)
        l1EntryCount = Int(bytes.bigEndian(at: 8, as: UInt32.self))
        guard offset < UInt64(QCOW2.Limit.hostOffsetMax),
            Int(offset).isAligned(to: geometry.clusterSize),
            l1EntryCount <= QCOW2.Limit.l1TableBytesMax / 8
        else {
            throw BlockError(
                .corrupt,
                "the L1 table of snapshot \(index), \(l1EntryCount) entries at \(offset), is out "
                    + "of bounds", remedy: "repair the image")
        }
        l1Offset = Int(offset)
        seconds = bytes.bigEndian(at: 16)
        nanoseconds = bytes.bigEndian(at: 20)
        vmClock = bytes.bigEndian(at: 24)
        shortVMStateSize = bytes.bigEndian(at: 32)
        let identifierStart = Self.fixedLength + extraLength
        extra = Array(bytes[Self.fixedLength..<identifierStart])
        identifier = Array(bytes[identifierStart..<(identifierStart + identifierLength)])
        name = Array(bytes[(identifierStart + identifierLength)...])
        if let size = diskSize, size > UInt64(Limits.nodeSizeMax) {
            throw BlockError(
                .corrupt, "the disk of snapshot \(index), of \(size) bytes, is out of bounds",
                remedy: "repair the image")
        }
    }

    /// The bytes of a table.
    ///
    /// - Throws: `exhausted` past the format's limits.
    static func serialiseTable(_ entries: [QCOW2.Snapshot]) throws(BlockError) -> [UInt8] {
        var bytes: [UInt8] = []
        for entry in entries {
            var fixed = [UInt8](repeating: 0, count: fixedLength)
            fixed.withUnsafeMutableBytes { out in
                out.storeBigEndian(UInt64(entry.l1Offset), at: 0)
                out.storeBigEndian(UInt32(entry.l1EntryCount), at: 8)
                out.storeBigEndian(UInt16(truncatingIfNeeded: entry.identifier.count), at: 12)
                out.storeBigEndian(UInt16(truncatingIfNeeded: entry.name.count), at: 14)
                out.storeBigEndian(entry.seconds, at: 16)
                out.storeBigEndian(entry.nanoseconds, at: 20)
                out.storeBigEndian(entry.vmClock, at: 24)
                out.storeBigEndian(entry.shortVMStateSize, at: 32)
                out.storeBigEndian(UInt32(entry.extra.count), at: 36)
            }
            bytes += fixed + entry.extra + entry.identifier + entry.name
            bytes += [UInt8](repeating: 0, count: -bytes.count & 7)
        }
        guard bytes.count <= QCOW2.Limit.snapshotTableBytesMax,
            entries.count <= QCOW2.Limit.snapshotCountMax
        else {
            throw BlockError(
                .exhausted,
                "\(entries.count) snapshots in a table of \(bytes.count) bytes are more than an "
                    + "image may have (\(QCOW2.Limit.snapshotCountMax), "
                    + "\(QCOW2.Limit.snapshotTableBytesMax) bytes)",
                remedy: "delete snapshots")
        }
        return bytes
    }
}
