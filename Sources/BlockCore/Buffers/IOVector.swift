/// The memory of one request: one slice, or several that follow each other (scatter/gather).
///
/// The first slice is inline, so that the common request allocates nothing.
public struct IOVector: Sendable {
    @usableFromInline var first: IOSlice?
    @usableFromInline var rest: [IOSlice]
    /// Bytes in all.
    public private(set) var count: Int

    public init() {
        first = nil
        rest = []
        count = 0
    }

    @inlinable
    public init(_ slice: IOSlice) {
        self.init(single: slice, count: slice.count)
    }

    @usableFromInline
    init(single: IOSlice, count: Int) {
        first = single
        rest = []
        self.count = count
    }

    /// Fresh memory of `count` bytes, its content undefined.
    public init(allocating count: Int) throws(BlockError) {
        self.init(try IOBuffer(count: count).prefix(count))
    }

    /// Fresh memory holding a copy of `bytes`.
    public init(copying bytes: UnsafeRawBufferPointer) throws(BlockError) {
        try self.init(allocating: bytes.count)
        copy(from: bytes)
    }

    public var segmentCount: Int { first == nil ? 0 : 1 + rest.count }

    /// The only slice, where there is exactly one.
    @inlinable
    public var single: IOSlice? { rest.isEmpty ? first : nil }

    public var isEmpty: Bool { count == 0 }

    /// Adds a slice at the end. The total must stay within `Int`, which real memory guarantees.
    public mutating func append(_ slice: IOSlice) {
        guard slice.count > 0 || first == nil else { return }
        if first == nil { first = slice } else { rest.append(slice) }
        count += slice.count
    }

    public mutating func append(_ other: IOVector) {
        other.forEachSegment { append($0) }
    }

    public func forEachSegment(_ body: (IOSlice) -> Void) {
        if let first { body(first) }
        for slice in rest { body(slice) }
    }

    /// `count` bytes from `start`; shares the memory. Traps when out of bounds.
    public func slice(_ start: Int, _ count: Int) -> IOVector {
        precondition(start >= 0 && count >= 0 && start <= self.count && count <= self.count - start)
        if rest.isEmpty, let first { return IOVector(first.slice(start, count)) }
        var result = IOVector()
        var skip = start
        var left = count
        forEachSegment { segment in
            guard left > 0 else { return }
            if skip >= segment.count {
                skip -= segment.count
                return
            }
            let part = min(segment.count - skip, left)
            result.append(segment.slice(skip, part))
            skip = 0
            left -= part
        }
        return result
    }

    /// Copies `source` to the start of this memory. Traps when it does not fit.
    public func copy(from source: UnsafeRawBufferPointer) {
        precondition(source.count <= count)
        var done = 0
        forEachSegment { segment in
            let part = min(segment.count, source.count - done)
            guard part > 0 else { return }
            segment.bytes.copyMemory(
                from: UnsafeRawBufferPointer(rebasing: source[done..<(done + part)]))
            done += part
        }
    }

    /// Copies as many bytes as both hold from `source`.
    public func copy(from source: IOVector) {
        var done = 0
        source.forEachSegment { segment in
            let part = min(segment.count, count - done)
            guard part > 0 else { return }
            slice(done, part).copy(
                from: UnsafeRawBufferPointer(rebasing: segment.bytes[0..<part]))
            done += part
        }
    }

    /// Copies the start of this memory to `target`, as much as fits.
    public func copy(to target: UnsafeMutableRawBufferPointer) {
        var done = 0
        forEachSegment { segment in
            let part = min(segment.count, target.count - done)
            guard part > 0 else { return }
            UnsafeMutableRawBufferPointer(rebasing: target[done..<(done + part)])
                .copyMemory(from: UnsafeRawBufferPointer(rebasing: segment.bytes[0..<part]))
            done += part
        }
    }

    /// Fills the memory with `value`.
    public func fill(_ value: UInt8) {
        forEachSegment { segment in
            segment.bytes.initializeMemory(as: UInt8.self, repeating: value)
        }
    }

    /// Fills `count` bytes from `start` with zeroes.
    public func zero(_ start: Int, _ count: Int) {
        slice(start, count).fill(0)
    }

    /// Whether every byte is zero.
    public var isZero: Bool {
        var result = true
        forEachSegment { segment in
            result = result && ZeroDetection.isZero(UnsafeRawBufferPointer(segment.bytes))
        }
        return result
    }

    /// A copy of the bytes: for tests, headers and small things.
    public var array: [UInt8] {
        [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            copy(to: UnsafeMutableRawBufferPointer(buffer))
            initialized = count
        }
    }
}
