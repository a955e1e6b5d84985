/// A range of bytes of a node: `[offset, offset + count)`.
///
/// Invariant: `0 ≤ offset`, `0 ≤ count`, and `offset + count` does not overflow. Whoever holds a
/// `ByteRange` may add to it up to `end` without checks; numbers from outside enter through
/// ``init(checking:count:)``.
public struct ByteRange: Hashable, Sendable {
    public let offset: Int
    public let count: Int

    /// A range whose bounds the caller knows to be sound. A caller's mistake traps.
    @inlinable @inline(__always)
    public init(_ offset: Int, _ count: Int) {
        precondition(offset >= 0 && count >= 0 && offset <= Int.max &- count, "unsound range")
        self.offset = offset
        self.count = count
    }

    /// A range from numbers that came from outside, or `nil` when they make none.
    @inlinable
    public init?(checking offset: some BinaryInteger, count: some BinaryInteger) {
        guard let start = Int(exactly: offset), let length = Int(exactly: count),
            start >= 0, length >= 0, start.adding(length) != nil
        else { return nil }
        self.offset = start
        self.count = length
    }

    /// `[start, end)`; traps when `end < start`.
    @inlinable
    public init(from start: Int, to end: Int) {
        self.init(start, end - start)
    }

    /// One past the last byte.
    @inlinable @inline(__always)
    public var end: Int { offset &+ count }

    @inlinable
    public var isEmpty: Bool { count == 0 }

    @inlinable
    public func overlaps(_ other: ByteRange) -> Bool {
        offset < other.end && other.offset < end
    }

    @inlinable
    public func contains(_ other: ByteRange) -> Bool {
        offset <= other.offset && other.end <= end
    }

    /// The bytes in both, or `nil` when there are none.
    @inlinable
    public func intersection(_ other: ByteRange) -> ByteRange? {
        let start = max(offset, other.offset)
        let stop = min(end, other.end)
        return start < stop ? ByteRange(from: start, to: stop) : nil
    }

    /// The smallest range of whole `alignment` units (a power of two) around this one, or `nil` when
    /// its end overflows.
    @inlinable
    public func aligned(to alignment: Int) -> ByteRange? {
        guard let stop = end.roundedUp(to: alignment) else { return nil }
        return ByteRange(from: offset.roundedDown(to: alignment), to: stop)
    }

    @inlinable
    public func isAligned(to alignment: Int) -> Bool {
        (offset | count).isAligned(to: alignment)
    }
}

extension ByteRange: CustomStringConvertible {
    public var description: String { "\(offset)+\(count)" }
}
