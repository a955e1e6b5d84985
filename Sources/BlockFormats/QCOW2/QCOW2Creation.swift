import BlockCore
import BlockGraph
import QMP

/// Makes new images, as `blockdev-create` with driver `qcow2` does.
enum QCOW2Creation {
    enum Version: String, Sendable, CaseIterable { case v2, v3 }
    enum Compression: String, Sendable, CaseIterable { case zlib, zstd }

    static let writeBytesMax = 1 << 20

    static func create(_ creation: ImageCreation) async throws(BlockError) {
        let options = creation.options
        guard let size = try options.size("size") else {
            throw BlockError(.invalidArgument, "option 'size' is missing")
        }
        let preallocation =
            try options.enumeration("preallocation", as: Preallocation.self) ?? .off
        var header = try header(options, size: size, preallocation)
        let encryption = try QCOW2EncryptionCreation(options, creation.graph)
        guard encryption == nil || preallocation == .off || header.version == 3 else {
            throw BlockError(
                .unsupported, "version 2 of qcow2 cannot preallocate clusters of encrypted images",
                remedy: "use version=v3")
        }
        let hasDataFile = try takeDataFile(options, &header, creation.graph.registry)
        // The raw file stands for the disk without the tables: none of its clusters may be elsewhere.
        let isRaw = header.autoclear.contains(.rawExternalData)
        guard !isRaw || encryption == nil else {
            throw BlockError(
                .invalidArgument, "encryption and 'data-file-raw' exclude each other")
        }
        let layout = try QCOW2.CreationLayout(
            size: size, geometry: header.geometry,
            isPreallocated: preallocation != .off || isRaw, hasDataFile: hasDataFile,
            encryptionBytes: encryption?.headerBytes ?? 0,
            showsBacking: !header.backingName.isEmpty)
        _ = try options.value("file")
        try options.finish()
        // Nothing is touched before all is known to be good.
        let target = try await creation.target("file")
        let data = hasDataFile ? try await dataFile(creation, &header) : nil
        if let data {
            try await data.resize(to: 0)
            try await data.resize(to: size, preallocation == .metadata ? .off : preallocation)
        }
        try await write(
            header, layout, data == nil ? preallocation : .off, encryption, to: target)
    }

    /// Whether guest data goes to a file of its own.
    private static func takeDataFile(
        _ options: OptionReader, _ header: inout QCOW2.Header, _ registry: DriverRegistry
    ) throws(BlockError) -> Bool {
        let isRaw = try options.bool("data-file-raw") == true
        guard let file = try options.value("data-file") else {
            if isRaw {
                throw BlockError(.invalidArgument, "'data-file-raw' needs 'data-file'")
            }
            return false
        }
        guard header.version == 3 else {
            throw BlockError(
                .invalidArgument, "external data files need version 3 of qcow2",
                remedy: "use version=v3")
        }
        guard !isRaw || header.backingName.isEmpty else {
            throw BlockError(
                .invalidArgument, "a backing file and 'data-file-raw' exclude each other")
        }
        if file["driver"] == "file", case .string(let name)? = file["filename"],
            QCOW2Driver.isProtocolName(name, registry)
        {
            throw BlockError(
                .invalidArgument,
                "the image could not be opened with '\(name)' as the name of its data file: that "
                    + "does not stand for a local file", remedy: "begin the name with ./")
        }
        header.incompatible.insert(.externalData)
        if isRaw { header.autoclear.insert(.rawExternalData) }
        return true
    }

    /// The file of its own that guest data goes to.
    private static func dataFile(
        _ creation: ImageCreation, _ header: inout QCOW2.Header
    ) async throws(BlockError) -> Edge {
        let data = try await creation.target("data-file")
        header.extensions.insert(
            .init(
                type: QCOW2.HeaderExtension.externalDataName,
                data: Array(data.node.driver.filename.utf8)), at: 0)
        return data
    }

    static func header(
        _ options: OptionReader, size: Int, _ preallocation: Preallocation
    ) throws(BlockError) -> QCOW2.Header {
        var header = QCOW2.Header()
        guard size <= Limits.nodeSizeMax else {
            throw BlockError(.invalidArgument, "a disk of \(size) bytes is out of bounds")
        }
        header.size = size
        header.version = try options.enumeration("version", as: Version.self) == .v2 ? 2 : 3
        let clusterSize = try options.size("cluster-size") ?? 65536
        guard clusterSize.isPowerOfTwo,
            clusterSize.trailingZeroBitCount >= QCOW2.Limit.clusterBitsMin,
            clusterSize.trailingZeroBitCount <= QCOW2.Limit.clusterBitsMax
        else {
            throw BlockError(
                .invalidArgument,
                "'cluster-size' must be a power of two from 512 to 2 MiB, not "
                    + "\(clusterSize)")
        }
        header.clusterBits = clusterSize.trailingZeroBitCount
        let bits = try options.int("refcount-bits") ?? 16
        guard bits.isPowerOfTwo, bits <= 64 else {
            throw BlockError(
                .invalidArgument, "'refcount-bits' must be a power of two up to 64, not \(bits)")
        }
        header.refcountOrder = bits.trailingZeroBitCount
        try takeVersion3Options(options, &header)
        try takeBacking(options, &header, preallocation)
        if header.version == 3 {
            let names = QCOW2.FeatureName.serialise(QCOW2.FeatureName.all)
            header.extensions.append(
                .init(type: QCOW2.HeaderExtension.featureNames, data: names))
            header.dropNamesIfTooLong()
        }
        return header
    }

    private static func takeVersion3Options(
        _ options: OptionReader, _ header: inout QCOW2.Header
    ) throws(BlockError) {
        let isLazy = try options.bool("lazy-refcounts") ?? false
        let compression =
            try options.enumeration("compression-type", as: Compression.self) ?? .zlib
        func need(_ isNeeded: Bool, _ what: String) throws(BlockError) {
            if isNeeded, header.version < 3 {
                throw BlockError(
                    .invalidArgument, "\(what) need version 3 of qcow2", remedy: "use version=v3")
            }
        }
        try need(isLazy, "lazy refcounts")
        try need(header.refcountOrder != 4, "refcounts of other than 16 bits")
        try need(compression == .zstd, "images compressed with zstd")
        if try options.bool("extended-l2") == true {
            try need(true, "extended L2 entries")
            guard header.clusterBits >= QCOW2.Limit.subclusteredClusterBitsMin else {
                throw BlockError(
                    .invalidArgument,
                    "extended L2 entries need clusters of 16 KiB or more, not of "
                        + "\(1 << header.clusterBits) bytes", remedy: "use larger clusters")
            }
            header.incompatible.insert(.extendedL2)
        }
        if isLazy { header.compatible.insert(.lazyRefcounts) }
        if compression == .zstd {
            header.compression = .zstd
            header.incompatible.insert(.compressionType)
        }
    }

    private static func takeBacking(
        _ options: OptionReader, _ header: inout QCOW2.Header, _ preallocation: Preallocation
    ) throws(BlockError) {
        let format = try options.string("backing-fmt")
        guard let name = try options.string("backing-file") else {
            if format != nil {
                throw BlockError(.invalidArgument, "'backing-fmt' needs 'backing-file'")
            }
            return
        }
        guard preallocation == .off || header.incompatible.contains(.extendedL2) else {
            throw BlockError(
                .invalidArgument, "preallocation hides the backing file",
                remedy: "leave one of them out, or use extended-l2=on")
        }
        header.backingName = Array(name.utf8)
        guard header.backingName.count <= QCOW2.Limit.backingNameBytesMax else {
            throw BlockError(
                .invalidArgument,
                "the backing file name of \(header.backingName.count) bytes is "
                    + "longer than \(QCOW2.Limit.backingNameBytesMax)")
        }
        if let format {
            header.extensions.append(
                .init(type: QCOW2.HeaderExtension.backingFormat, data: Array(format.utf8)))
        }
    }

    // MARK: Writing

    private static func write(
        _ unplaced: QCOW2.Header, _ layout: QCOW2.CreationLayout, _ preallocation: Preallocation,
        _ encryption: QCOW2EncryptionCreation?, to target: Edge
    ) async throws(BlockError) {
        var header = unplaced
        header.refcountTableOffset = layout.refcountTableOffset
        header.refcountTableClusters = layout.refcountTableClusters
        header.l1Offset = layout.l1Offset
        header.l1EntryCount = layout.l1EntryCount
        if let encryption {
            header.setEncryptionHeader(
                ByteRange(layout.encryptionOffset, encryption.headerBytes))
        }
        header.dropNamesIfTooLong()
        let start = try header.serialised()
        try await makeRoom(layout, preallocation, target)

        let clusterSize = layout.geometry.clusterSize
        try await writeClusters(
            layout.refcountBlocksOffset, layout.refcountBlockCount, clusterSize, target
        ) { block, index in layout.fillRefcounts(block, index) }
        var refcountTable = (0..<layout.refcountBlockCount).map {
            UInt64(layout.refcountBlockOffset($0))
        }
        try await writeTable(
            &refcountTable, layout.refcountTableOffset, layout.refcountTableClusters, layout, target
        )
        var l1 = layout.l1Table
        try await writeTable(&l1, layout.l1Offset, layout.l1Clusters, layout, target)
        try await writeClusters(
            layout.l2Offset, layout.l2TableCount, clusterSize, target
        ) { table, index in layout.fillL2(table, index) }

        if let encryption {
            try await encryption.write(to: target, at: layout.encryptionOffset)
        }

        // The header last: before it, there is no image.
        try await target.flush()
        let first = start + [UInt8](repeating: 0, count: clusterSize - start.count)
        try await target.write(0, from: try QCOW2Image.vector(first))
        try await target.flush()
    }

    private static func makeRoom(
        _ layout: QCOW2.CreationLayout, _ preallocation: Preallocation, _ target: Edge
    ) async throws(BlockError) {
        do throws(BlockError) {
            try await target.resize(to: 0)
            let reserves = preallocation == .falloc || preallocation == .full
            try await target.resize(to: layout.end, reserves ? preallocation : .off)
        } catch  where error.code == .unsupported {
            // A device: what it held before must not be read.
            guard target.size >= layout.end else {
                throw BlockError(
                    .noSpace,
                    "the image needs \(layout.end) bytes, '\(target.node.name)' has "
                        + "\(target.size)")
            }
            var offset = 0
            while offset < layout.end {
                let count = min(layout.end - offset, 1 << 30)
                try await target.writeZeroes(ByteRange(offset, count))
                offset += count
            }
        }
    }

    private static func writeTable(
        _ table: inout [UInt64], _ offset: Int, _ clusters: Int, _ layout: QCOW2.CreationLayout,
        _ target: Edge
    ) async throws(BlockError) {
        let count = clusters << (layout.geometry.clusterBits - 3)
        table.append(contentsOf: [UInt64](repeating: 0, count: count - table.count))
        try await target.write(
            offset, from: try QCOW2Image.vector(QCOW2Refcounts.bigEndian(table[...])))
    }

    /// Writes `count` clusters that `fill` makes, several at a time.
    private static func writeClusters(
        _ offset: Int, _ count: Int, _ clusterSize: Int, _ target: Edge,
        _ fill: (UnsafeMutableRawBufferPointer, Int) -> Void
    ) async throws(BlockError) {
        if count == 0 { return }
        let perWrite = max(1, min(count, writeBytesMax / clusterSize))
        let slice = try IOBuffer(count: perWrite * clusterSize).prefix(perWrite * clusterSize)
        var index = 0
        while index < count {
            let clusters = min(perWrite, count - index)
            for step in 0..<clusters {
                fill(slice.slice(step * clusterSize, clusterSize).bytes, index + step)
            }
            try await target.write(
                offset + index * clusterSize, from: IOVector(slice.slice(0, clusters * clusterSize))
            )
            index += clusters
        }
    }
}
