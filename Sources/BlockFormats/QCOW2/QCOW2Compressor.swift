import BlockCore
import CZlib
import CZstd

/// Compresses clusters, one after the other, with state that is set up once. For one thread.
///
/// Deflate is raw, with a window of 4 KiB, as readers expect it (§Compressed clusters); a zstd
/// cluster is one frame.
final class QCOW2Compressor {
    /// log2 of the deflate window.
    private static let windowBits: Int32 = 12
    /// The most memory for deflate's hash tables: it is what compresses best.
    private static let memoryLevel: Int32 = 9

    private enum State {
        case deflate(UnsafeMutablePointer<z_stream>)
        case zstd(OpaquePointer)
    }

    private let state: State

    /// `nil` when there is no memory.
    init?(_ type: QCOW2.CompressionType) {
        switch type {
        case .zlib:
            let stream = UnsafeMutablePointer<z_stream>.allocate(capacity: 1)
            stream.initialize(to: z_stream())
            let opened = deflateInit2_(
                stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -Self.windowBits, Self.memoryLevel,
                Z_DEFAULT_STRATEGY, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
            guard opened == Z_OK else {
                stream.deallocate()
                return nil
            }
            state = .deflate(stream)
        case .zstd:
            guard let context = ZSTD_createCCtx() else { return nil }
            state = .zstd(context)
        }
    }

    deinit {
        switch state {
        case .deflate(let stream):
            deflateEnd(stream)
            stream.deallocate()
        case .zstd(let context):
            ZSTD_freeCCtx(context)
        }
    }

    /// - Returns: the bytes written; `nil` when they would not fit in `target`.
    func compress(
        _ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer
    ) -> Int? {
        switch state {
        case .deflate(let stream):
            return deflate(stream, source, target)
        case .zstd(let context):
            let count = ZSTD_compress2(
                context, target.baseAddress, target.count, source.baseAddress, source.count)
            return ZSTD_isError(count) == 0 ? count : nil
        }
    }

    private func deflate(
        _ stream: UnsafeMutablePointer<z_stream>, _ source: UnsafeRawBufferPointer,
        _ target: UnsafeMutableRawBufferPointer
    ) -> Int? {
        guard deflateReset(stream) == Z_OK else { return nil }
        stream.pointee.next_in = UnsafeMutablePointer(
            mutating: source.baseAddress?.assumingMemoryBound(to: UInt8.self))
        stream.pointee.avail_in = UInt32(source.count)
        stream.pointee.next_out = target.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.pointee.avail_out = UInt32(target.count)
        guard CZlib.deflate(stream, Z_FINISH) == Z_STREAM_END else { return nil }
        return target.count - Int(stream.pointee.avail_out)
    }
}

/// Clusters that worker threads compress side by side.
///
/// Each index is handed to one worker; the results are read when all are done.
final class QCOW2CompressionBatch: @unchecked Sendable {
    private let data: IOVector
    private let clusterSize: Int
    let count: Int
    private let output: IOBuffer
    private let sizes: UnsafeMutableBufferPointer<Int>

    /// - Parameter data: whole clusters; what lacks at the end counts as zeroes.
    init(_ data: IOVector, clusterSize: Int) throws(BlockError) {
        self.data = data
        self.clusterSize = clusterSize
        count = (data.count - 1) / clusterSize + 1
        output = try IOBuffer(count: count * clusterSize)
        sizes = .allocate(capacity: count)
        sizes.initialize(repeating: 0)
    }

    deinit { sizes.deallocate() }

    /// The compressed cluster; `nil` where compression saves nothing.
    subscript(index: Int) -> IOSlice? {
        sizes[index] > 0 ? IOSlice(output, index * clusterSize, sizes[index]) : nil
    }

    func compress(_ index: Int, with compressor: QCOW2Compressor) {
        let start = index * clusterSize
        let part = data.slice(start, min(clusterSize, data.count - start))
        // One byte less: as large as a cluster is no gain.
        let target = IOSlice(output, start, clusterSize - 1).bytes
        if part.count == clusterSize, let whole = part.single {
            sizes[index] =
                compressor.compress(UnsafeRawBufferPointer(whole.bytes), into: target) ?? 0
            return
        }
        // Scattered memory, or the disk's last cluster: the codecs want it in one piece.
        let gathered = UnsafeMutableRawBufferPointer.allocate(byteCount: clusterSize, alignment: 16)
        defer { gathered.deallocate() }
        part.copy(to: gathered)
        gathered[part.count...].initializeMemory(as: UInt8.self, repeating: 0)
        sizes[index] = compressor.compress(UnsafeRawBufferPointer(gathered), into: target) ?? 0
    }
}
