import BlockCore

// Replies (proto.md, "Simple reply message", "Structured reply chunk message", "Extended reply chunk
// message"). Every function writes at the start of the caller's memory and returns how many bytes it
// wrote; memory too small for it traps. Nothing allocates.
//
//     simple       0 magic   4 error            8 cookie
//     structured   0 magic   4 flags   6 type   8 cookie   16 length (32 bits)                payload
//     extended     0 magic   4 flags   6 type   8 cookie   16 offset   24 length (64 bits)    payload

/// Encodes replies into memory of the caller.
public enum NBDReply {
    /// Bytes of a simple reply before its data.
    public static let simpleCount = 16
    /// Bytes of a structured chunk before its payload.
    public static let structuredCount = 20
    /// Bytes of an extended chunk before its payload.
    public static let extendedCount = 32
    /// Enough for the fixed part of any reply but an error's text and a status' extents.
    public static let headerCountMax = extendedCount + 12

    /// Bytes of a chunk before its payload.
    @inlinable @inline(__always)
    public static func chunkCount(_ mode: NBDReplyMode) -> Int {
        mode == .extended ? extendedCount : structuredCount
    }

    /// A simple reply; a successful read's data follows it.
    @inlinable @discardableResult
    public static func simple(
        _ error: NBDErrorCode, cookie: UInt64, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        precondition(memory.count >= simpleCount)
        memory.storeBigEndian(NBDMagic.simpleReply, at: 0)
        memory.storeBigEndian(error.rawValue, at: 4)
        memory.storeBigEndian(cookie, at: 8)
        return simpleCount
    }

    /// The header of a chunk with `payloadCount` bytes of payload.
    @inlinable
    public static func chunk(
        _ type: NBDChunkType, _ flags: NBDChunkFlags, replyingTo request: NBDRequest,
        payloadCount: Int, mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        precondition(mode >= .structured && memory.count >= chunkCount(mode))
        memory.storeBigEndian(flags.rawValue, at: 4)
        memory.storeBigEndian(type.rawValue, at: 6)
        memory.storeBigEndian(request.cookie, at: 8)
        if mode == .extended {
            memory.storeBigEndian(NBDMagic.extendedReply, at: 0)
            memory.storeBigEndian(request.headerOffset, at: 16)
            memory.storeBigEndian(UInt64(payloadCount), at: 24)
        } else {
            memory.storeBigEndian(NBDMagic.structuredReply, at: 0)
            memory.storeBigEndian(UInt32(payloadCount), at: 16)
        }
        return chunkCount(mode)
    }

    /// The whole reply to a request that succeeded and has no data: every command but a read and a
    /// block status.
    @inlinable
    public static func success(
        _ request: NBDRequest, mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        // A simple reply is legal, and shorter, in the structured mode too where there is no data.
        if mode < .extended { return simple(.none, cookie: request.cookie, to: memory) }
        return chunk(.none, .done, replyingTo: request, payloadCount: 0, mode: mode, to: memory)
    }

    /// What comes before the data of a read that is answered in one piece: in the simple mode the
    /// reply's header, otherwise the header of one `OFFSET_DATA` chunk, the last of its reply.
    @inlinable
    public static func readHeader(
        _ request: NBDRequest, mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        if mode == .simple { return simple(.none, cookie: request.cookie, to: memory) }
        // An empty data chunk is not legal.
        if request.range.isEmpty {
            return chunk(.none, .done, replyingTo: request, payloadCount: 0, mode: mode, to: memory)
        }
        return data(request.range, .done, replyingTo: request, mode: mode, to: memory)
    }

    /// The header of an `OFFSET_DATA` chunk; `range.count` bytes of data follow it.
    ///
    /// - Parameter range: the part of the export; not empty, within the request.
    @inlinable
    public static func data(
        _ range: ByteRange, _ flags: NBDChunkFlags, replyingTo request: NBDRequest,
        mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        let count = chunk(
            .offsetData, flags, replyingTo: request, payloadCount: 8 + range.count, mode: mode,
            to: memory)
        memory.storeBigEndian(UInt64(range.offset), at: count)
        return count + 8
    }

    /// A whole `OFFSET_HOLE` chunk: `range` reads as zeroes.
    ///
    /// - Parameter range: the part of the export; not empty, within the request.
    @inlinable
    public static func hole(
        _ range: ByteRange, _ flags: NBDChunkFlags, replyingTo request: NBDRequest,
        mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        let count = chunk(
            .offsetHole, flags, replyingTo: request, payloadCount: 12, mode: mode, to: memory)
        memory.storeBigEndian(UInt64(range.offset), at: count)
        memory.storeBigEndian(UInt32(range.count), at: count + 8)
        return count + 12
    }

    /// The whole reply to a request that failed, or the last chunk of a reply that fails half-way.
    ///
    /// - Parameter message: for people; cut to what fits into `memory` and the protocol's limit.
    public static func failure(
        _ error: NBDErrorCode, _ message: String = "", replyingTo request: NBDRequest,
        mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        precondition(error != .none)
        if mode == .simple { return simple(error, cookie: request.cookie, to: memory) }
        return errorChunk(
            .error, error, message, offset: nil, replyingTo: request, mode: mode, to: memory)
    }

    /// The last chunk of a read that failed at `offset` of the export.
    public static func failure(
        _ error: NBDErrorCode, _ message: String, at offset: Int, replyingTo request: NBDRequest,
        mode: NBDReplyMode, to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        precondition(error != .none)
        return errorChunk(
            .errorOffset, error, message, offset: offset, replyingTo: request, mode: mode,
            to: memory)
    }

    /// Bytes that a failure with this message may need.
    public static func failureCountMax(_ message: String) -> Int {
        extendedCount + 6 + min(message.utf8.count, NBDLimits.stringBytesMax) + 8
    }

    /// `NBD_REPLY_TYPE_ERROR` and `NBD_REPLY_TYPE_ERROR_OFFSET`: 32-bit error, 16-bit message length,
    /// message, and for the latter a 64-bit offset.
    private static func errorChunk(
        _ type: NBDChunkType, _ error: NBDErrorCode, _ message: String, offset: Int?,
        replyingTo request: NBDRequest, mode: NBDReplyMode,
        to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        let fixed = chunkCount(mode) + 6 + (offset == nil ? 0 : 8)
        precondition(memory.count >= fixed)
        let text = message.cut(toBytes: min(memory.count - fixed, NBDLimits.stringBytesMax)).utf8
        let start = chunk(
            type, .done, replyingTo: request, payloadCount: fixed - chunkCount(mode) + text.count,
            mode: mode, to: memory)
        memory.storeBigEndian(error.rawValue, at: start)
        memory.storeBigEndian(UInt16(text.count), at: start + 4)
        UnsafeMutableRawBufferPointer(rebasing: memory[(start + 6)...]).copyBytes(from: text)
        if let offset { memory.storeBigEndian(UInt64(offset), at: start + 6 + text.count) }
        return fixed + text.count
    }
}

/// One extent of a block status reply.
public struct NBDStatusExtent: Hashable, Sendable {
    /// In bytes, at least 1.
    public var count: Int
    /// What the context's document says they mean.
    public var flags: UInt64

    @inlinable
    public init(count: Int, flags: UInt64) {
        self.count = count
        self.flags = flags
    }
}

extension NBDReply {
    /// Bytes of a block status chunk with `extentCount` extents.
    public static func statusCount(_ extentCount: Int, mode: NBDReplyMode) -> Int {
        chunkCount(mode) + (mode == .extended ? 8 + 16 * extentCount : 4 + 8 * extentCount)
    }

    /// A whole block status chunk of one context: `BLOCK_STATUS` (32-bit id; 32-bit lengths and flags)
    /// or `BLOCK_STATUS_EXT` (32-bit id, 32-bit count; 64-bit lengths and flags).
    ///
    /// - Parameters:
    ///   - extents: from the request's offset on, at least one, at most
    ///     ``NBDLimits/statusExtentCountMax``. In the structured mode a length that does not fit into
    ///     32 bits is cut, and ends the reply: status may stop short.
    ///   - memory: at least ``statusCount(_:mode:)`` bytes.
    public static func status(
        _ extents: some RandomAccessCollection<NBDStatusExtent>, contextID: UInt32,
        _ flags: NBDChunkFlags, replyingTo request: NBDRequest, mode: NBDReplyMode,
        to memory: UnsafeMutableRawBufferPointer
    ) -> Int {
        precondition(!extents.isEmpty && extents.count <= NBDLimits.statusExtentCountMax)
        let isExtended = mode == .extended
        let start = chunkCount(mode)
        precondition(memory.count >= statusCount(extents.count, mode: mode))
        memory.storeBigEndian(contextID, at: start)
        var end = start + (isExtended ? 8 : 4)
        var written = 0
        for extent in extents {
            written += 1
            if isExtended {
                memory.storeBigEndian(UInt64(extent.count), at: end)
                memory.storeBigEndian(extent.flags, at: end + 8)
                end += 16
                continue
            }
            // 4 GiB less 64 KiB: the largest cut that is aligned for any block size.
            let isCut = extent.count > Int(UInt32.max)
            memory.storeBigEndian(isCut ? 0xffff_0000 : UInt32(extent.count), at: end)
            memory.storeBigEndian(UInt32(truncatingIfNeeded: extent.flags), at: end + 4)
            end += 8
            if isCut { break }
        }
        if isExtended { memory.storeBigEndian(UInt32(written), at: start + 4) }
        _ = chunk(
            isExtended ? .blockStatusExtended : .blockStatus, flags, replyingTo: request,
            payloadCount: end - start, mode: mode, to: memory)
        return end
    }
}
