import BlockCore
import BlockIO

/// Receives a stream into large buffers and hands out parts of them, without copying.
///
/// A write's payload that came with its header is a part of the buffer it came in; what is missing is
/// received straight into memory of its own behind that part.
struct NBDInput {
    private static let bufferCapacity = 256 << 10
    /// Less room than this is not worth a receive.
    private static let roomMin = 4 << 10
    /// Behind a payload of as much what follows is received with its rest. The client goes on sending while the
    /// request is carried out then, instead of waiting until there is room in the socket. Shorter ones would
    /// hold buffers that are much larger than themselves.
    private static let aheadMin = 64 << 10

    private var buffer: IOBuffer
    private var start = 0
    private var end = 0

    init() throws(BlockError) {
        buffer = try IOBuffer(count: Self.bufferCapacity)
    }

    var available: Int { end - start }

    /// The bytes that are there and not taken yet.
    var bytes: UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(buffer.prefix(end).slice(start, end - start).bytes)
    }

    mutating func drop(_ count: Int) {
        precondition(count <= available)
        start += count
    }

    /// Puts bytes that were received elsewhere in front.
    mutating func prepend(_ bytes: [UInt8]) throws(BlockError) {
        precondition(available == 0 && bytes.count <= buffer.capacity)
        start = 0
        end = bytes.count
        buffer.prefix(end).bytes.copyBytes(from: bytes)
    }

    /// Receives more.
    /// - Returns: `false` at the end of the stream.
    mutating func receive(
        from channel: any NBDChannel, isLikelyThere: Bool = true
    ) async throws(BlockError) -> Bool {
        try makeRoom()
        let count = try await channel.receive(
            IOVector(IOSlice(buffer, end, buffer.capacity - end)), isLikelyThere: isLikelyThere)
        end += count
        return count > 0
    }

    private mutating func makeRoom() throws(BlockError) {
        if isKnownUniquelyReferenced(&buffer) {
            // No payload is in use any more: begin at the front again, where the cache is warm.
            if start > 0 {
                let rest = available
                let memory = buffer.prefix(buffer.capacity).bytes
                if rest > 0, let base = memory.baseAddress {
                    // At most a header and a bit: receives stop at whole requests where they can.
                    base.copyMemory(from: base + start, byteCount: rest)
                }
                start = 0
                end = rest
            }
            if end < buffer.capacity { return }
        } else if buffer.capacity - end >= Self.roomMin {
            return
        }
        // Payloads in flight keep the old buffer; what is not taken yet moves on.
        let fresh = try IOBuffer(count: Self.bufferCapacity)
        let rest = available
        fresh.prefix(rest).bytes.copyMemory(from: bytes)
        buffer = fresh
        start = 0
        end = rest
    }

    /// Takes `count` bytes, receiving what is missing.
    ///
    /// - Throws: `disconnected` when the stream ends before.
    mutating func take(
        _ count: Int, from channel: any NBDChannel
    ) async throws(BlockError) -> IOVector {
        let here = min(count, available)
        var result = here > 0 ? IOVector(IOSlice(buffer, start, here)) : IOVector()
        start += here
        guard here < count else { return result }
        let rest = try IOVector(allocating: count - here)
        let isLong = count >= Self.aheadMin
        if isLong {
            if !isKnownUniquelyReferenced(&buffer) {
                buffer = try IOBuffer(count: Self.bufferCapacity)
            }
            start = 0
            end = 0
        }
        var done = 0
        while done < rest.count {
            var room = done == 0 ? rest : rest.slice(done, rest.count - done)
            if isLong { room.append(IOVector(buffer.prefix(buffer.capacity))) }
            let part = try await channel.receive(room, isLikelyThere: true)
            guard part > 0 else {
                throw BlockError(.disconnected, "the client went away in the middle of a request")
            }
            done += part
        }
        if isLong { end = done - rest.count }
        result.append(rest)
        return result
    }

    /// Receives and drops `count` bytes.
    mutating func skip(_ count: Int, from channel: any NBDChannel) async throws(BlockError) {
        var left = count
        while true {
            let here = min(left, available)
            start += here
            left -= here
            if left == 0 { return }
            guard try await receive(from: channel) else {
                throw BlockError(.disconnected, "the client went away in the middle of a request")
            }
        }
    }
}
