import BlockCore

/// A named record of what changed on a node, at some granularity.
public final class DirtyBitmap: WriteObserver {
    public let name: String
    /// Bytes that one bit stands for: a power of two, at least 512.
    public let granularity: Int
    /// Of the node when the bitmap was made, in bytes.
    public private(set) var size: Int
    /// Changes are recorded.
    public var isEnabled = true
    private var bits: ClusterBitmap

    public static let granularityMin = 512
    public static let granularityMax = 1 << 31
    /// The default, and what clusters are clamped to for it.
    public static let granularityDefault = 64 << 10

    /// - Throws: `invalidArgument` when the name or granularity is out of bounds.
    public init(name: String, granularity: Int, size: Int) throws(BlockError) {
        guard !name.isEmpty, name.utf8.count <= Limits.bitmapNameLengthMax else {
            throw BlockError(
                .invalidArgument,
                "a dirty bitmap's name has 1 to \(Limits.bitmapNameLengthMax) bytes")
        }
        guard granularity.isPowerOfTwo, granularity >= Self.granularityMin,
            granularity <= Self.granularityMax
        else {
            throw BlockError(
                .invalidArgument,
                "a dirty bitmap's granularity is a power of two from \(Self.granularityMin) to "
                    + "\(Self.granularityMax), not \(granularity)")
        }
        guard let count = ClusterBitmap.count(covering: size, unit: granularity) else {
            throw BlockError(
                .exhausted,
                "a dirty bitmap of \(size) bytes in units of \(granularity) is too large",
                remedy: "use a larger granularity")
        }
        self.name = name
        self.granularity = granularity
        self.size = size
        bits = ClusterBitmap(count: count)
    }

    /// Bytes that are marked, counted in whole units.
    public var dirtyBytes: Int { bits.setCount * granularity }

    public func changed(_ range: ByteRange) {
        if isEnabled { mark(range) }
    }

    /// Marks what lies within the bitmap.
    public func mark(_ range: ByteRange) {
        guard let inside = range.intersection(ByteRange(0, size)) else { return }
        bits.set(inside.offset / granularity..<(inside.end - 1) / granularity + 1)
    }

    public func clear() {
        bits.clear(0..<bits.count)
    }

    /// Whether the unit at `offset` is marked, and where that run of units ends.
    public func run(at offset: Int) -> (isDirty: Bool, end: Int) {
        precondition(offset >= 0 && offset < size)
        let index = offset / granularity
        let isDirty = bits[index]
        let rest = index..<bits.count
        let end = isDirty ? bits.firstClear(in: rest) : bits.firstSet(in: rest)
        return (isDirty, end.map { $0 * granularity } ?? size)
    }

    public func forEachDirtyRange(_ body: (ByteRange) -> Void) {
        var offset = 0
        while offset < size {
            let (isDirty, end) = run(at: offset)
            if isDirty { body(ByteRange(from: offset, to: end)) }
            offset = end
        }
    }
}

extension BlockNode {
    public func dirtyBitmap(named name: String) -> DirtyBitmap? {
        writeObservers.lazy.compactMap { $0 as? DirtyBitmap }.first { $0.name == name }
    }
}
