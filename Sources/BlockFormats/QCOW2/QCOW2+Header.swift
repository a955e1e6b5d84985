import BlockCore

extension QCOW2 {
    /// Feature bits that a reader must know (§Header, bytes 72–79).
    struct IncompatibleFeatures: OptionSet, Equatable, Sendable {
        let rawValue: UInt64
        static let dirty = IncompatibleFeatures(rawValue: 1)
        static let corrupt = IncompatibleFeatures(rawValue: 2)
        static let externalData = IncompatibleFeatures(rawValue: 4)
        static let compressionType = IncompatibleFeatures(rawValue: 8)
        static let extendedL2 = IncompatibleFeatures(rawValue: 16)
        static let known: IncompatibleFeatures = [
            .dirty, .corrupt, .externalData, .compressionType, .extendedL2,
        ]
    }

    /// Feature bits that a reader may ignore (§Header, bytes 80–87).
    struct CompatibleFeatures: OptionSet, Equatable, Sendable {
        let rawValue: UInt64
        static let lazyRefcounts = CompatibleFeatures(rawValue: 1)
    }

    /// Feature bits that a writer clears when it does not know them (§Header, bytes 88–95).
    struct AutoclearFeatures: OptionSet, Equatable, Sendable {
        let rawValue: UInt64
        static let bitmaps = AutoclearFeatures(rawValue: 1)
        static let rawExternalData = AutoclearFeatures(rawValue: 2)
        static let known: AutoclearFeatures = [.bitmaps, .rawExternalData]
    }

    enum CompressionType: UInt8, Sendable {
        case zlib = 0
        case zstd = 1
    }

    /// The header of cluster 0, its extensions and the backing name behind them.
    ///
    /// ```
    ///   0 magic            4 version           8 backing name: offset   16 its length
    ///  20 cluster bits    24 size             32 encryption             36 L1 entries
    ///  40 L1 offset       48 refcount table   56 its clusters           60 snapshots
    ///  64 snapshot table  72 incompatible     80 compatible             88 autoclear
    ///  96 refcount order 100 header length   104 compression type      (from 72: version 3)
    /// ```
    struct Header: Equatable, Sendable {
        static let lengthV2 = 72
        static let lengthV3Min = 104
        static let lengthV3 = 112

        var version = 3
        /// As it stands in the image; empty when there is none.
        var backingName: [UInt8] = []
        var clusterBits = 16
        var size = 0
        var encryptionMethod: UInt32 = 0
        var l1EntryCount = 0
        var l1Offset = 0
        var refcountTableOffset = 0
        var refcountTableClusters = 0
        var snapshotCount = 0
        var snapshotsOffset = 0
        var incompatible: IncompatibleFeatures = []
        var compatible: CompatibleFeatures = []
        var autoclear: AutoclearFeatures = []
        var refcountOrder = 4
        var compression = CompressionType.zlib
        /// Header bytes past what is known, kept as they are.
        var unknownFields: [UInt8] = []
        /// Where the LUKS header of an encrypted image is.
        var encryptionHeader: ByteRange?
        /// In their order on disk, unknown ones included.
        var extensions: [HeaderExtension] = []

        /// The clusters of the LUKS header.
        var encryptionPlace: ByteRange? { encryptionHeader?.aligned(to: 1 << clusterBits) }

        var geometry: Geometry {
            Geometry(
                clusterBits: clusterBits, refcountOrder: refcountOrder,
                hasSubclusters: incompatible.contains(.extendedL2))
        }
    }
}

extension QCOW2.Header {
    /// The cluster size of the image that begins with `start`, without looking further.
    static func clusterBits(of start: UnsafeRawBufferPointer) throws(BlockError) -> Int {
        guard start.count >= lengthV2, start.bigEndian(at: 0, as: UInt32.self) == QCOW2.magic else {
            throw BlockError(
                .wrongFormat, "the file does not begin like a qcow2 image",
                remedy: "open it with the driver of its own format")
        }
        let version = start.bigEndian(at: 4, as: UInt32.self)
        guard version == 2 || version == 3 else {
            throw BlockError(.unsupported, "qcow2 version \(version) is not supported")
        }
        let bits = Int(start.bigEndian(at: 20, as: UInt32.self))
        guard bits >= QCOW2.Limit.clusterBitsMin, bits <= QCOW2.Limit.clusterBitsMax else {
            throw BlockError(
                .corrupt, "clusters of 2^\(bits) bytes are out of bounds (512 B…2 MiB)")
        }
        return bits
    }

    /// Parses and validates the header, its extensions and the backing name.
    ///
    /// - Parameters:
    ///   - cluster: the first cluster, or what there is of it.
    ///   - fileSize: the size of the file; tables must begin within it.
    ///   - forCheck: take what a check can look at, though nothing else can use it.
    init(
        parsing cluster: UnsafeRawBufferPointer, fileSize: Int, forCheck: Bool = false
    ) throws(BlockError) {
        clusterBits = try Self.clusterBits(of: cluster)
        version = Int(cluster.bigEndian(at: 4, as: UInt32.self))
        size = try Self.size(cluster)
        encryptionMethod = cluster.bigEndian(at: 32)
        l1EntryCount = Int(cluster.bigEndian(at: 36, as: UInt32.self))
        refcountTableClusters = Int(cluster.bigEndian(at: 56, as: UInt32.self))
        snapshotCount = Int(cluster.bigEndian(at: 60, as: UInt32.self))
        l1Offset = try Self.table(cluster, at: 40, "L1 table", clusterBits)
        refcountTableOffset = try Self.table(cluster, at: 48, "refcount table", clusterBits)
        snapshotsOffset =
            snapshotCount == 0
            ? 0 : try Self.table(cluster, at: 64, "snapshot table", clusterBits)

        var length = Self.lengthV2
        if version == 3 { length = try parseVersion3(cluster) }
        let nameOffset = try parseBackingName(cluster, headerLength: length)
        extensions = try QCOW2.HeaderExtension.parse(
            cluster, from: length, to: nameOffset ?? cluster.count)
        encryptionHeader = parseEncryptionHeader()
        if !forCheck || !incompatible.isSubset(of: .known) { try checkFeatures() }
        try checkTables(forCheck ? Limits.nodeSizeMax : fileSize)
    }

    private static func size(_ cluster: UnsafeRawBufferPointer) throws(BlockError) -> Int {
        let value: UInt64 = cluster.bigEndian(at: 24)
        guard let size = Int(exactly: value), size <= Limits.nodeSizeMax else {
            throw BlockError(.corrupt, "a disk of \(value) bytes is out of bounds")
        }
        return size
    }

    private static func table(
        _ cluster: UnsafeRawBufferPointer, at offset: Int, _ name: String, _ clusterBits: Int
    ) throws(BlockError) -> Int {
        let value: UInt64 = cluster.bigEndian(at: offset)
        guard value < UInt64(QCOW2.Limit.hostOffsetMax), Int(value).isAligned(to: 1 << clusterBits)
        else {
            throw BlockError(.corrupt, "the \(name) is said to be at \(value), which is no cluster")
        }
        return Int(value)
    }

    /// - Returns: the header's length.
    private mutating func parseVersion3(
        _ cluster: UnsafeRawBufferPointer
    ) throws(BlockError) -> Int {
        guard cluster.count >= Self.lengthV3Min else {
            throw BlockError(.corrupt, "the file ends within the qcow2 header")
        }
        incompatible = .init(rawValue: cluster.bigEndian(at: 72))
        compatible = .init(rawValue: cluster.bigEndian(at: 80))
        autoclear = .init(rawValue: cluster.bigEndian(at: 88))
        refcountOrder = Int(cluster.bigEndian(at: 96, as: UInt32.self))
        let length = Int(cluster.bigEndian(at: 100, as: UInt32.self))
        guard refcountOrder <= QCOW2.Limit.refcountOrderMax else {
            throw BlockError(.corrupt, "refcounts of 2^\(refcountOrder) bits are out of bounds")
        }
        guard length >= Self.lengthV3Min, length <= cluster.count, length.isAligned(to: 8) else {
            throw BlockError(.corrupt, "a header of \(length) bytes is out of bounds")
        }
        var type: UInt8 = 0
        if length > Self.lengthV3Min { type = cluster[Self.lengthV3Min] }
        guard let known = QCOW2.CompressionType(rawValue: type) else {
            throw BlockError(.unsupported, "compression type \(type) is not supported")
        }
        guard (type != 0) == incompatible.contains(.compressionType) else {
            throw BlockError(.corrupt, "the compression type and its feature bit contradict")
        }
        compression = known
        if length > Self.lengthV3 { unknownFields = Array(cluster[Self.lengthV3..<length]) }
        return length
    }

    /// - Returns: where it begins, `nil` when there is none.
    private mutating func parseBackingName(
        _ cluster: UnsafeRawBufferPointer, headerLength: Int
    ) throws(BlockError) -> Int? {
        let offset: UInt64 = cluster.bigEndian(at: 8)
        if offset == 0 { return nil }
        let length = Int(cluster.bigEndian(at: 16, as: UInt32.self))
        guard length <= QCOW2.Limit.backingNameBytesMax else {
            throw BlockError(
                .corrupt,
                "a backing file name of \(length) bytes is longer than "
                    + "\(QCOW2.Limit.backingNameBytesMax)")
        }
        guard let range = ByteRange(checking: offset, count: length),
            range.offset >= headerLength, range.end <= cluster.count
        else {
            throw BlockError(.corrupt, "the backing file name lies outside of the first cluster")
        }
        backingName = Array(cluster[range.offset..<range.end])
        return range.offset
    }

    private func checkFeatures() throws(BlockError) {
        let unknown = incompatible.subtracting(.known)
        guard unknown.isEmpty else {
            let names = featureNames(unknown)
            throw BlockError(
                .unsupported,
                "the image needs features that are not known: "
                    + names.joined(separator: ", "))
        }
        guard
            !incompatible.contains(.extendedL2)
                || clusterBits >= QCOW2.Limit.subclusteredClusterBitsMin
        else {
            throw BlockError(
                .corrupt, "clusters of \(1 << clusterBits) bytes are too small for subclusters")
        }
        guard encryptionMethod <= 2 else {
            throw BlockError(
                .unsupported,
                "the image is encrypted with method \(encryptionMethod), which is not "
                    + "known")
        }
    }

    private func checkTables(_ fileSize: Int) throws(BlockError) {
        guard l1EntryCount <= QCOW2.Limit.l1TableBytesMax / 8 else {
            throw BlockError(.corrupt, "an L1 table of \(l1EntryCount) entries exceeds 32 MiB")
        }
        guard size == 0 || l1EntryCount >= geometry.l1EntryCount(for: size) else {
            throw BlockError(.corrupt, "the L1 table is too short for the disk of \(size) bytes")
        }
        guard refcountTableClusters > 0,
            refcountTableClusters <= max(1, QCOW2.Limit.refcountTableBytesMax >> clusterBits)
        else {
            throw BlockError(
                .corrupt, "a refcount table of \(refcountTableClusters) clusters is out of bounds")
        }
        guard snapshotCount <= QCOW2.Limit.snapshotCountMax else {
            throw BlockError(.corrupt, "\(snapshotCount) snapshots are more than the format has")
        }
        guard l1EntryCount == 0 || l1Offset > 0, refcountTableOffset > 0,
            l1Offset < max(fileSize, 1), refcountTableOffset < fileSize
        else {
            throw BlockError(
                .corrupt, "a table lies past the end of the file at \(fileSize)",
                remedy: "the file was cut short: restore it")
        }
    }

    /// The bytes of cluster 0 up to the end of the backing name.
    ///
    /// - Throws: `invalidArgument` when they do not fit in a cluster.
    func serialised() throws(BlockError) -> [UInt8] {
        let length = version == 2 ? Self.lengthV2 : Self.lengthV3 + unknownFields.count
        let tail = QCOW2.HeaderExtension.serialise(extensions)
        let nameOffset = length + tail.count
        let total = nameOffset + backingName.count
        guard backingName.count <= QCOW2.Limit.backingNameBytesMax, total <= 1 << clusterBits else {
            throw BlockError(
                .invalidArgument,
                "the backing file name of \(backingName.count) bytes does not fit "
                    + "in a cluster of \(1 << clusterBits)",
                remedy: "use a shorter name or larger clusters")
        }
        var bytes = [UInt8](repeating: 0, count: length)
        bytes.withUnsafeMutableBytes { out in
            out.storeBigEndian(QCOW2.magic, at: 0)
            out.storeBigEndian(UInt32(version), at: 4)
            if !backingName.isEmpty {
                out.storeBigEndian(UInt64(nameOffset), at: 8)
                out.storeBigEndian(UInt32(backingName.count), at: 16)
            }
            out.storeBigEndian(UInt32(clusterBits), at: 20)
            out.storeBigEndian(UInt64(size), at: 24)
            out.storeBigEndian(encryptionMethod, at: 32)
            out.storeBigEndian(UInt32(l1EntryCount), at: 36)
            out.storeBigEndian(UInt64(l1Offset), at: 40)
            out.storeBigEndian(UInt64(refcountTableOffset), at: 48)
            out.storeBigEndian(UInt32(refcountTableClusters), at: 56)
            out.storeBigEndian(UInt32(snapshotCount), at: 60)
            out.storeBigEndian(UInt64(snapshotsOffset), at: 64)
            guard version == 3 else { return }
            out.storeBigEndian(incompatible.rawValue, at: 72)
            out.storeBigEndian(compatible.rawValue, at: 80)
            out.storeBigEndian(autoclear.rawValue, at: 88)
            out.storeBigEndian(UInt32(refcountOrder), at: 96)
            out.storeBigEndian(UInt32(length), at: 100)
            out[104] = compression.rawValue
        }
        if version == 3 {
            bytes.replaceSubrange(Self.lengthV3..<length, with: unknownFields)
        }
        return bytes + tail + backingName
    }
}
