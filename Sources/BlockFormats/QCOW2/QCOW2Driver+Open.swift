import BlockCore
import BlockGraph
import BlockIO
import QMP

/// Opening: header, children, tables, and what an earlier user left to do.
extension QCOW2Driver {
    public static let driver = DriverDescription(
        name: "qcow2", kind: .format,
        open: { opening throws(BlockError) in
            if opening.node.options.isForCheck { return try await QCOW2CheckNode.open(opening) }
            return try await QCOW2Driver.open(opening)
        },
        create: { creation throws(BlockError) in try await QCOW2Creation.create(creation) },
        probe: { start in
            guard start.count >= 8, start.bigEndian(at: 0, as: UInt32.self) == QCOW2.magic else {
                return 0
            }
            // Versions to come as well: opening refuses them by name. Version 1 is another format.
            return start.bigEndian(at: 4, as: UInt32.self) >= 2 ? 100 : 0
        },
        supportsBacking: true,
        measure: { options throws(BlockError) in try QCOW2Measure.measure(options) })

    static func open(_ opening: NodeOpening) async throws(BlockError) -> QCOW2Driver {
        let node = opening.node
        let file = try await opening.requiredChild("file", roles: .image)
        if file.node.isReadOnly, !node.isReadOnly {
            guard node.options.autoReadOnly else {
                throw BlockError(
                    .readOnly, "'\(file.node.name)' is read-only", remedy: "open with read-only=on")
            }
            node.setReadOnly()
        }
        var header = try await readHeader(file)
        if !node.isReadOnly { try checkWritable(header) }
        _ = try await opening.child(
            "backing", roles: .cow, fallback: try await backingOptions(header, opening, file))
        let data = try await openDataFile(header, opening, file)
        let encryption = try await QCOW2Encryption.open(
            header, file, opening.options, for: node)
        let options = try QCOW2Options(
            reading: opening.options, header, discards: node.options.discards)
        // Last: an image that cannot be opened stays as it is.
        if !node.isReadOnly, header.incompatible.contains(.dirty) {
            try await QCOW2Check.mendCounts(file, header, on: opening.thread)
            header = try await readHeader(file)
        }
        let driver = try await make(
            node, file, data: data, encryption, header, options, writable: !node.isReadOnly)
        if !node.isReadOnly { try await driver.prepareWriting() }
        try await driver.bitmaps.load()
        driver.startCleaning()
        return driver
    }

    /// The driver of an image, from what the file has; nothing is written.
    static func make(
        _ node: BlockNode, _ file: Edge, data: Edge?, _ encryption: QCOW2Encryption?,
        _ header: QCOW2.Header, _ options: QCOW2Options, writable: Bool
    ) async throws(BlockError) -> QCOW2Driver {
        if writable { try checkWritable(header) }
        let image = QCOW2Image(node, file, header)
        image.overlapCheck = options.overlapCheck
        image.l1 = try await readTable(file, header.l1Offset, header.l1EntryCount)
        var refcountTable: [UInt64] = []
        if writable {
            refcountTable = try await readTable(
                file, header.refcountTableOffset,
                header.refcountTableClusters << (header.clusterBits - 3))
            try checkTables(image, refcountTable)
        }
        let driver = QCOW2Driver(
            node, file, data: data, image, options, refcountTable: refcountTable)
        driver.encryption = encryption
        encryption?.area?.checkWrite = { offset, count throws(BlockError) in
            try await image.checkOverlap(
                offset, count, ignoring: .encryptionHeader, "the encryption header")
        }
        driver.takeLimits()
        try await driver.loadSnapshots(writable: writable)
        try await driver.bitmaps.readDirectory(writable: writable)
        return driver
    }

    static func readHeader(_ file: Edge) async throws(BlockError) -> QCOW2.Header {
        func read(_ count: Int) async throws(BlockError) -> [UInt8] {
            let vector = try IOVector(allocating: min(count, file.size))
            try await file.read(0, into: vector)
            return vector.array
        }
        var start = try await read(4096)
        func parse<T>(
            _ body: (UnsafeRawBufferPointer) throws(BlockError) -> T
        ) throws(BlockError) -> T {
            // A typed error does not pass through the closure of `withUnsafeBytes`.
            let result = start.withUnsafeBytes { bytes -> Result<T, BlockError> in
                do throws(BlockError) {
                    return .success(try body(bytes))
                } catch {
                    return .failure(error)
                }
            }
            return try result.get()
        }
        let bits = try parse { bytes throws(BlockError) in try QCOW2.Header.clusterBits(of: bytes) }
        if bits > 12 { start = try await read(1 << bits) }
        start = Array(start.prefix(1 << bits))
        return try parse { bytes throws(BlockError) in
            try QCOW2.Header(parsing: bytes, fileSize: file.size)
        }
    }

    /// What may be done with an image depends on how it is opened.
    private static func checkWritable(_ header: QCOW2.Header) throws(BlockError) {
        if header.incompatible.contains(.corrupt) {
            throw BlockError(
                .corrupt, "the image is marked corrupt and cannot be written",
                remedy: "repair it, or open it with read-only=on")
        }
    }

    static func readTable(
        _ file: Edge, _ offset: Int, _ count: Int
    ) async throws(BlockError) -> [UInt64] {
        // What is past the end of the file, an entry cut through included, reads as zeroes.
        var table = [UInt64](repeating: 0, count: count)
        let there = max(0, min(count * 8, file.size - offset)) & ~7
        // In pieces: a table may be long, and is in memory once.
        let pieceBytes = 1 << 18
        let memory = try IOBuffer(count: pieceBytes)
        var done = 0
        while done < there {
            let piece = memory.prefix(min(pieceBytes, there - done))
            try await file.read(offset + done, into: IOVector(piece))
            let bytes = UnsafeRawBufferPointer(piece.bytes)
            for index in 0..<piece.count / 8 {
                table[done / 8 + index] = bytes.bigEndian(at: index * 8)
            }
            done += piece.count
        }
        return table
    }

    /// Tables of an image that will be written must be where tables can be.
    private static func checkTables(
        _ image: QCOW2Image, _ refcountTable: [UInt64]
    ) throws(BlockError) {
        for entry in image.l1 {
            let offset = QCOW2.L1Entry(rawValue: entry).offset
            if offset == 0 { continue }
            guard offset.isAligned(to: image.geometry.clusterSize) else {
                throw BlockError(.corrupt, "an L2 table is at \(offset), which is no cluster")
            }
            image.addTable(at: offset)
        }
        for entry in refcountTable {
            guard entry < UInt64(QCOW2.Limit.hostOffsetMax),
                Int(entry).isAligned(to: image.geometry.clusterSize)
            else {
                throw BlockError(.corrupt, "a refcount block is at \(entry), which is no cluster")
            }
        }
    }

    // MARK: Backing

    /// The options that open the backing file that the image names.
    private static func backingOptions(
        _ header: QCOW2.Header, _ opening: NodeOpening, _ file: Edge
    ) async throws(BlockError) -> JSONValue? {
        if header.backingName.isEmpty { return nil }
        if try opening.options.value("backing") != nil { return nil }
        let name = String(decoding: header.backingName, as: UTF8.self)
        guard !opening.node.options.isUntrusted else {
            throw BlockError(
                .permissionDenied,
                "the image names the backing file '\(name)', which is not followed "
                    + "in images that are not trusted",
                remedy: "give 'backing' explicitly, null for none")
        }
        if name.hasPrefix("json:") {
            return try await opening.graph.imageOptions(json: String(name.dropFirst(5)))
        }
        if let colon = name.firstIndex(of: ":"), !name[..<colon].contains("/"),
            !name.hasPrefix("file:")
        {
            throw BlockError(
                .unsupported, "the backing file '\(name)' is not a local file",
                remedy: "open it as a node and give its name as 'backing'")
        }
        let path = resolve(name, beside: file.node.driver.filename)
        do throws(BlockError) {
            return try await options(
                forPath: path, format: header.backingFormat, opening)
        } catch {
            throw error.doing("cannot open the backing file '\(path)'")
        }
    }

    /// Relative names are relative to the image's folder.
    static func resolve(_ name: String, beside image: String) -> String {
        let plain = name.hasPrefix("file:") ? String(name.dropFirst(5)) : name
        if plain.hasPrefix("/") { return plain }
        guard let slash = image.lastIndex(of: "/"), !image.hasPrefix("json:") else { return plain }
        return image[...slash] + plain
    }

    static func options(
        forPath path: String, format: String?, _ opening: NodeOpening
    ) async throws(BlockError) -> JSONValue {
        let file = try await File.open(path, FileOptions(writable: false), on: opening.thread)
        var driver = format
        var isDevice = false
        do throws(BlockError) {
            isDevice = try await file.status().kind == .blockDevice
            if driver == nil {
                let start = try IOVector(allocating: 4096)
                let count = try await file.read(start, at: 0)
                driver = try opening.graph.registry.format(
                    of: path, beginning: start.slice(0, count).array)
            }
        } catch {
            await file.close()
            throw error
        }
        await file.close()
        var options: JSONObject = [
            "driver": .string(driver ?? "raw"),
            "file": [
                "driver": isDevice ? "host_device" : "file", "filename": .string(path),
            ],
        ]
        // What a guest wrote above must not make it another format's when it is committed.
        if format == nil, driver == "raw" { options["x-probed"] = true }
        return .object(options)
    }

    // MARK: Start

    /// Makes an image that was just opened ready to be written.
    private func prepareWriting() async throws(BlockError) {
        image.dropUnknownFeatures()
        try await image.writeStaleHeader()
    }

    /// Drops unused tables from memory now and then.
    func startCleaning() {
        guard options.cacheCleanInterval > 0 else { return }
        let timer = IOTimer(on: node.seat)
        cleaner = timer
        let nanoseconds = UInt64(options.cacheCleanInterval) * 1_000_000_000
        clean(after: nanoseconds, timer)
    }

    private func clean(after nanoseconds: UInt64, _ timer: IOTimer) {
        node.seat.spawn { [weak self] in
            guard await timer.wait(nanoseconds: nanoseconds), let self else { return }
            l2.dropUnused()
            refcounts.dropUnused()
            startCleaning()
        }
    }

    // MARK: Information

    public var information: NodeInformation {
        get async throws(BlockError) {
            let header = image.header
            var result = NodeInformation()
            result.clusterSize = geometry.clusterSize
            result.isEncrypted = isEncrypted
            result.isDirty = header.incompatible.contains(.dirty)
            result.isCorrupt = header.incompatible.contains(.corrupt)
            if !header.backingName.isEmpty {
                result.backingName = String(decoding: header.backingName, as: UTF8.self)
                result.backingFormat = header.backingFormat
            }
            var data: JSONObject = ["compat": header.version == 3 ? "1.1" : "0.10"]
            data["compression-type"] = header.compression == .zlib ? "zlib" : "zstd"
            if header.version == 3 {
                data["lazy-refcounts"] = .bool(header.compatible.contains(.lazyRefcounts))
            }
            data["bitmaps"] = await bitmaps.information()
            data["refcount-bits"] = .integer(1 << header.refcountOrder)
            if hasDataFile {
                if let name = header.dataFileName { data["data-file"] = .string(name) }
                data["data-file-raw"] = .bool(header.autoclear.contains(.rawExternalData))
            }
            if let encryption { data["encrypt"] = encryption.information }
            if header.version == 3 {
                data["corrupt"] = .bool(result.isCorrupt)
                data["extended-l2"] = .bool(hasSubclusters)
            }
            result.formatSpecific = ["type": "qcow2", "data": .object(data)]
            return result
        }
    }
}
