/// Page-aligned memory for I/O, shared by reference; the last reference returns it to the pool.
///
/// Whoever fills a buffer owns it until the request that fills it completes; after that its bytes do
/// not change while anyone else holds it. That convention, not the type, is why it is `Sendable`.
public final class IOBuffer: @unchecked Sendable {
    public let base: UnsafeMutableRawPointer
    /// Usable bytes, at least as many as were asked for.
    public let capacity: Int

    /// Memory of at least `count` bytes, its content undefined.
    ///
    /// - Throws: `exhausted` when there is no memory or `count` is above
    ///   ``Limits/requestBytesMax``.
    public init(count: Int) throws(BlockError) {
        precondition(count >= 0)
        guard count <= Limits.requestBytesMax else {
            throw BlockError(.exhausted, "a buffer of \(count) bytes is too large")
        }
        capacity = BufferPool.capacity(for: count)
        guard let memory = BufferPool.shared.allocate(capacity: capacity) else {
            throw BlockError(.exhausted, "no memory for a buffer of \(count) bytes")
        }
        base = memory
    }

    deinit {
        BufferPool.shared.release(base, capacity: capacity)
    }

    /// The first `count` bytes as a slice.
    public func prefix(_ count: Int) -> IOSlice {
        IOSlice(self, 0, count)
    }

    /// How much memory is kept for reuse from now on, in bytes.
    public static func keepForReuse(atMost bytes: Int) {
        BufferPool.shared.keep(atMost: bytes)
    }
}

/// A part of an ``IOBuffer``.
public struct IOSlice: Sendable {
    public let buffer: IOBuffer
    public let offset: Int
    public let count: Int

    /// Traps when the part is not within the buffer.
    @inlinable
    public init(_ buffer: IOBuffer, _ offset: Int, _ count: Int) {
        precondition(
            offset >= 0 && count >= 0 && offset <= buffer.capacity
                && count <= buffer.capacity - offset)
        self.buffer = buffer
        self.offset = offset
        self.count = count
    }

    /// Valid while the slice is alive.
    @inlinable
    public var bytes: UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(start: buffer.base + offset, count: count)
    }

    /// `count` bytes from `start` of this slice.
    @inlinable
    public func slice(_ start: Int, _ count: Int) -> IOSlice {
        precondition(start >= 0 && count >= 0 && start <= self.count && count <= self.count - start)
        return IOSlice(buffer, offset + start, count)
    }
}
