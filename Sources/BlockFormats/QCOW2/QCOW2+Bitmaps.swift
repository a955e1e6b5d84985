import BlockCore

// Dirty bitmaps as they are stored in an image (§Bitmaps extension, §Bitmaps).
//
//     header extension ──► directory ──► table of each bitmap ──► clusters with its bits
//
// A bit stands for 2^granularity bytes of the disk; bit i is bit i % 8, from the least significant
// on, of byte i / 8. Where all bits of a cluster are the same, the table says so without a cluster.

extension QCOW2.Limit {
    static let bitmapCountMax = 65_535
    static let bitmapDirectoryBytesMax = 64 << 20
    static let bitmapGranularityBitsMin = 9
    static let bitmapGranularityBitsMax = 31
    static let bitmapNameBytesMax = 1023
    /// Clusters of one bitmap's bits.
    static let bitmapBytesMax = 512 << 20
    /// Memory that the bits of all bitmaps of one image may take; bitmaps beyond are not loaded.
    static let bitmapMemoryBytesMax = 1 << 30
}

extension QCOW2 {
    /// The bitmaps extension: where the directory is.
    ///
    /// ```
    ///  0 number of bitmaps    4 reserved    8 directory: its bytes    16 its offset
    /// ```
    struct BitmapsExtension: Equatable, Sendable {
        static let length = 24

        var count: Int
        var directoryBytes: Int
        var directoryOffset: Int

        init(count: Int, directoryBytes: Int, directoryOffset: Int) {
            self.count = count
            self.directoryBytes = directoryBytes
            self.directoryOffset = directoryOffset
        }

        init(parsing data: [UInt8], clusterSize: Int) throws(BlockError) {
            guard data.count == Self.length else {
                throw BlockError(
                    .corrupt, "a bitmaps extension of \(data.count) bytes is out of bounds")
            }
            let fields = data.withUnsafeBytes { bytes in
                (
                    count: Int(bytes.bigEndian(at: 0, as: UInt32.self)),
                    reserved: bytes.bigEndian(at: 4, as: UInt32.self),
                    bytes: bytes.bigEndian(at: 8, as: UInt64.self),
                    offset: bytes.bigEndian(at: 16, as: UInt64.self)
                )
            }
            guard fields.reserved == 0 else {
                throw BlockError(.corrupt, "a reserved field of the bitmaps extension is not zero")
            }
            guard fields.count > 0, fields.count <= QCOW2.Limit.bitmapCountMax else {
                throw BlockError(.corrupt, "\(fields.count) stored bitmaps are out of bounds")
            }
            guard fields.bytes > 0, fields.bytes <= UInt64(QCOW2.Limit.bitmapDirectoryBytesMax)
            else {
                throw BlockError(
                    .corrupt, "a bitmap directory of \(fields.bytes) bytes is out of bounds")
            }
            guard fields.offset > 0, fields.offset < UInt64(QCOW2.Limit.hostOffsetMax),
                Int(fields.offset).isAligned(to: clusterSize)
            else {
                throw BlockError(
                    .corrupt,
                    "the bitmap directory is said to be at \(fields.offset), which is no "
                        + "cluster")
            }
            count = fields.count
            directoryBytes = Int(fields.bytes)
            directoryOffset = Int(fields.offset)
        }

        var serialised: [UInt8] {
            var data = [UInt8](repeating: 0, count: Self.length)
            data.withUnsafeMutableBytes { out in
                out.storeBigEndian(UInt32(truncatingIfNeeded: count), at: 0)
                out.storeBigEndian(UInt64(directoryBytes), at: 8)
                out.storeBigEndian(UInt64(directoryOffset), at: 16)
            }
            return data
        }
    }

    /// An entry of the bitmap directory.
    ///
    /// ```
    ///  0 table: offset    8 its entries     12 flags    16 type    17 granularity bits
    /// 18 name: bytes     20 extra data: bytes           24 extra data, name, padding to 8
    /// ```
    struct BitmapEntry: Equatable, Sendable {
        static let fixedLength = 24
        static let dirtyTracking: UInt8 = 1

        struct Flags: OptionSet, Equatable, Sendable {
            let rawValue: UInt32
            /// Not stored since it may have changed: what is stored says nothing.
            static let inUse = Flags(rawValue: 1)
            /// Records as soon as the image is open.
            static let auto = Flags(rawValue: 2)
            /// Who does not know the extra data may use the bitmap all the same.
            static let extraDataCompatible = Flags(rawValue: 4)
            static let known: Flags = [.inUse, .auto, .extraDataCompatible]
        }

        var tableOffset: Int
        /// Of 8 bytes each.
        var tableCount: Int
        var flags: Flags
        var type = dirtyTracking
        var granularityBits: Int
        var extraData: [UInt8] = []
        var name: [UInt8]

        var granularity: Int { 1 << granularityBits }

        /// The name, unless it is no text.
        var text: String? { String(validating: name, as: UTF8.self) }

        /// Whether it may be read and changed here; what is not stays as it is.
        var isUsable: Bool {
            type == Self.dirtyTracking && text != nil
                && (extraData.isEmpty || flags.contains(.extraDataCompatible))
        }

        /// Bytes in the directory.
        var length: Int { (Self.fixedLength + extraData.count + name.count + 7) & ~7 }
    }
}

extension QCOW2.BitmapEntry {
    /// The entries of a directory.
    static func parse(
        _ bytes: UnsafeRawBufferPointer, count: Int, clusterSize: Int
    ) throws(BlockError) -> [QCOW2.BitmapEntry] {
        guard let entries = split(bytes) else {
            throw BlockError(.corrupt, "the bitmap directory ends within an entry")
        }
        guard entries.count == count else {
            throw BlockError(
                .corrupt,
                "the bitmap directory has \(entries.count) entries, the header says \(count)")
        }
        var names: Set<[UInt8]> = []
        for entry in entries {
            let name = QCOW2Check.printable(entry.name)
            if let fault = entry.fault(clusterSize: clusterSize) {
                throw BlockError(.corrupt, "the stored bitmap '\(name)' is broken: \(fault)")
            }
            guard names.insert(entry.name).inserted else {
                throw BlockError(.corrupt, "two stored bitmaps have the name '\(name)'")
            }
        }
        return entries
    }

    /// The entries of a directory as they stand, sound or not; `nil` where it ends within one.
    static func split(_ bytes: UnsafeRawBufferPointer) -> [QCOW2.BitmapEntry]? {
        var entries: [QCOW2.BitmapEntry] = []
        var offset = 0
        while offset < bytes.count {
            let rest = UnsafeRawBufferPointer(rebasing: bytes[offset...])
            guard let entry = QCOW2.BitmapEntry(unchecked: rest) else { return nil }
            entries.append(entry)
            offset += entry.length
        }
        return entries
    }

    /// The entry at the start of `bytes`, whatever it says; `nil` where they end within it.
    private init?(unchecked bytes: UnsafeRawBufferPointer) {
        guard bytes.count >= Self.fixedLength else { return nil }
        tableOffset = Int(clamping: bytes.bigEndian(at: 0, as: UInt64.self))
        tableCount = Int(bytes.bigEndian(at: 8, as: UInt32.self))
        flags = Flags(rawValue: bytes.bigEndian(at: 12))
        type = bytes[16]
        granularityBits = Int(bytes[17])
        let nameCount = Int(bytes.bigEndian(at: 18, as: UInt16.self))
        let extraCount = Int(bytes.bigEndian(at: 20, as: UInt32.self))
        let end = Self.fixedLength + extraCount + nameCount
        guard (end + 7) & ~7 <= bytes.count else { return nil }
        extraData = Array(bytes[Self.fixedLength..<(Self.fixedLength + extraCount)])
        name = Array(bytes[(Self.fixedLength + extraCount)..<end])
    }

    /// What is wrong with the entry in itself, if anything is. Its type may be unknown.
    func fault(clusterSize: Int) -> String? {
        if name.isEmpty { return "it has no name" }
        if name.count > QCOW2.Limit.bitmapNameBytesMax {
            return "its name has \(name.count) bytes"
        }
        if !flags.isSubset(of: .known) { return "it has flags that are not known" }
        if granularityBits < QCOW2.Limit.bitmapGranularityBitsMin
            || granularityBits > QCOW2.Limit.bitmapGranularityBitsMax
        {
            return "its granularity is 2^\(granularityBits)"
        }
        guard tableOffset > 0, tableOffset < QCOW2.Limit.hostOffsetMax,
            tableOffset.isAligned(to: clusterSize)
        else { return "its table is said to be at \(tableOffset), which is no cluster" }
        guard tableCount > 0, tableCount <= QCOW2.Limit.bitmapBytesMax / clusterSize else {
            return "its table has \(tableCount) entries"
        }
        return nil
    }

    static func serialise(_ entries: [QCOW2.BitmapEntry]) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(entries.reduce(0) { $0 + $1.length })
        for entry in entries {
            var fixed = [UInt8](repeating: 0, count: fixedLength)
            fixed.withUnsafeMutableBytes { out in
                out.storeBigEndian(UInt64(entry.tableOffset), at: 0)
                out.storeBigEndian(UInt32(truncatingIfNeeded: entry.tableCount), at: 8)
                out.storeBigEndian(entry.flags.rawValue, at: 12)
                out[16] = entry.type
                out[17] = UInt8(truncatingIfNeeded: entry.granularityBits)
                out.storeBigEndian(UInt16(truncatingIfNeeded: entry.name.count), at: 18)
                out.storeBigEndian(UInt32(truncatingIfNeeded: entry.extraData.count), at: 20)
            }
            bytes += fixed + entry.extraData + entry.name
            bytes += [UInt8](repeating: 0, count: -bytes.count & 7)
        }
        return bytes
    }
}

extension QCOW2 {
    /// An entry of a bitmap's table: where the bits of one cluster are.
    struct BitmapTableEntry: Equatable, Sendable {
        static let allOnesFlag: UInt64 = 1
        static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00

        let rawValue: UInt64

        static let allZeroes = BitmapTableEntry(rawValue: 0)
        static let allOnes = BitmapTableEntry(rawValue: allOnesFlag)

        /// 0 where there is no cluster: then all bits are as ``isAllOnes`` says.
        var offset: Int { Int(rawValue & Self.offsetMask) }
        var isAllOnes: Bool { rawValue == Self.allOnesFlag }

        /// Whether it means anything in a file of `fileSize` bytes.
        func isValid(clusterSize: Int, fileSize: Int) -> Bool {
            if rawValue <= Self.allOnesFlag { return true }
            return rawValue & ~Self.offsetMask == 0 && offset.isAligned(to: clusterSize)
                && offset < fileSize
        }
    }

    /// Clusters that the bits of a bitmap take when stored: entries of its table.
    static func bitmapTableCount(bitCount: Int, clusterSize: Int) -> Int {
        let bytes = (bitCount + 7) / 8
        return (bytes + clusterSize - 1) / clusterSize
    }
}
