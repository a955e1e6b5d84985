import BlockCore
import BlockGraph
import CZlib
import CZstd

/// Decompressed clusters that were read last, so that small reads decompress a cluster once.
struct QCOW2DecompressedClusters {
    static let countMax = 4

    private var clusters: [(entry: UInt64, data: IOSlice)] = []

    func find(_ entry: UInt64) -> IOSlice? {
        clusters.first { $0.entry == entry }?.data
    }

    mutating func insert(_ entry: UInt64, _ data: IOSlice) {
        if clusters.count >= Self.countMax { clusters.removeFirst() }
        clusters.append((entry, data))
    }

    mutating func remove(_ entry: UInt64) { clusters.removeAll { $0.entry == entry } }

    /// The space may be used for something else from now on.
    mutating func removeAll() { clusters = [] }
}

extension QCOW2Driver {
    /// The part of a compressed cluster at guest `offset`.
    func readCompressed(
        _ entry: QCOW2.L2Entry, _ offset: Int, into part: IOVector
    ) async throws(BlockError) {
        let data: IOSlice
        if let found = decompressed.find(entry.rawValue) {
            data = found
        } else if part.count == geometry.clusterSize, let whole = part.single {
            // Nothing of it is left to be read soon.
            try await decompress(entry, into: whole)
            return
        } else {
            data = try IOBuffer(count: geometry.clusterSize).prefix(geometry.clusterSize)
            try await decompress(entry, into: data)
            decompressed.insert(entry.rawValue, data)
        }
        let inCluster = offset & (geometry.clusterSize - 1)
        part.copy(from: IOVector(data.slice(inCluster, part.count)))
    }

    private func decompress(
        _ entry: QCOW2.L2Entry, into target: IOSlice
    ) async throws(BlockError) {
        let descriptor = QCOW2.CompressedDescriptor(entry, clusterBits: geometry.clusterBits)
        let count = min(descriptor.byteCount, file.size - descriptor.offset)
        guard count > 0 else {
            throw await image.corruption(
                "a compressed cluster at \(descriptor.offset) lies past the end of the file")
        }
        let source = try IOBuffer(count: count).prefix(count)
        await file.reached(.readCompressed)
        try await file.read(descriptor.offset, into: IOVector(source))
        let type = image.header.compression
        let succeeded = await thread.offload {
            QCOW2.decompress(
                UnsafeRawBufferPointer(source.bytes), into: target.bytes, type)
        }
        guard succeeded else {
            throw BlockError(
                .corrupt, "the compressed cluster at \(descriptor.offset) in the file is damaged")
        }
    }
}

extension QCOW2 {
    /// Decompresses one cluster; the stream may be followed by other bytes.
    ///
    /// - Returns: whether the stream filled the cluster.
    static func decompress(
        _ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer,
        _ type: CompressionType
    ) -> Bool {
        decompressedCount(source, into: target, type) != nil
    }

    /// Decompresses one cluster; the stream may be followed by other bytes.
    ///
    /// - Returns: bytes of the stream; all there are where it does not say where it ends; `nil` where it
    ///   does not fill the cluster.
    static func decompressedCount(
        _ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer,
        _ type: CompressionType
    ) -> Int? {
        switch type {
        case .zlib: inflate(source, into: target)
        case .zstd: decompressZstd(source, into: target)
        }
    }

    /// Raw deflate, without zlib's header (§Compressed clusters).
    private static func inflate(
        _ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer
    ) -> Int? {
        var stream = z_stream()
        let opened = inflateInit2_(
            &stream, -15, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
        guard opened == Z_OK else { return nil }
        defer { inflateEnd(&stream) }
        stream.next_in = UnsafeMutablePointer(
            mutating: source.baseAddress?.assumingMemoryBound(to: UInt8.self))
        stream.avail_in = UInt32(source.count)
        stream.next_out = target.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.avail_out = UInt32(target.count)
        let result = CZlib.inflate(&stream, Z_FINISH)
        guard result == Z_STREAM_END || result == Z_BUF_ERROR, stream.avail_out == 0 else {
            return nil
        }
        return result == Z_STREAM_END ? source.count - Int(stream.avail_in) : source.count
    }

    private static func decompressZstd(
        _ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer
    ) -> Int? {
        guard let context = ZSTD_createDCtx() else { return nil }
        defer { ZSTD_freeDCtx(context) }
        var input = ZSTD_inBuffer(src: source.baseAddress, size: source.count, pos: 0)
        var output = ZSTD_outBuffer(dst: target.baseAddress, size: target.count, pos: 0)
        var isEnded = false
        while output.pos < output.size {
            let before = (input.pos, output.pos)
            let result = ZSTD_decompressStream(context, &output, &input)
            if ZSTD_isError(result) != 0 { return nil }
            // No progress: the stream is shorter than a cluster.
            if before == (input.pos, output.pos) { return nil }
            isEnded = result == 0
        }
        return isEnded ? input.pos : source.count
    }
}
