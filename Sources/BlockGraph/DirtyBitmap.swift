import BlockCore

/// A named record of what changed on a node, at some granularity. Confined to the graph's thread.
///
/// It is told of every change of its node, also of one that failed: what may have changed is dirty.
///
///     recording ◄──enable/disable──► not recording
///         busy           an export or a job relies on it: nobody else removes, clears or switches it
///         read-only      stored in an image that is open for reading only
///         inconsistent   stored in an image that was not closed: its bits say nothing, and it can
///                        only be removed
///
/// Invariants:
/// 1. A change of the node while it records is in `bits`, or in `newer` while it is split.
/// 2. `bits` and `newer` have one bit for each `granularity` bytes of `size`.
/// 3. While `source` is there nobody has asked for the bits: the node is read-only, and all count as set.
public final class DirtyBitmap: WriteObserver {
    public let name: String
    /// Bytes that one bit stands for: a power of two, at least 512.
    public let granularity: Int
    /// Of the node, in bytes.
    public private(set) var size: Int
    /// Changes are recorded.
    public var isEnabled = true
    /// It is stored in the node's image when that closes.
    public var isPersistent = false
    /// The image that it is stored in is open for reading only.
    public var isReadOnly: Bool { isPersistent && node?.isReadOnly ?? false }
    /// The node that it is on, or was on last.
    weak var node: BlockNode?
    /// It does not tell what changed: the image that it came from was not closed.
    public private(set) var isInconsistent = false
    /// Who relies on it, as errors name them.
    public private(set) var users: [String] = []

    private var bits: ClusterBitmap
    /// Changes since ``split()``.
    private var newer: ClusterBitmap?
    /// Where the bits are to be had, of a bitmap that is not loaded yet.
    private var source: (() async throws(BlockError) -> ClusterBitmap)?

    public static let granularityMin = 512
    public static let granularityMax = 1 << 31
    /// The default, and what clusters are clamped to for it.
    public static let granularityDefault = 64 << 10
    private static let granularityClusterMin = 4 << 10

    /// The granularity for a node whose clusters have `clusterSize` bytes; 0 for none.
    public static func granularity(forClusters clusterSize: Int) -> Int {
        clusterSize == 0
            ? granularityDefault : min(max(clusterSize, granularityClusterMin), granularityDefault)
    }

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

    /// Another one with the same bits, on no node.
    public func copy() throws(BlockError) -> DirtyBitmap {
        let other = try DirtyBitmap(name: name, granularity: granularity, size: size)
        other.contents = contents
        return other
    }

    /// One of which nothing but its existence is known.
    ///
    /// - Throws: as the initialiser.
    public static func inconsistent(
        named name: String, granularity: Int, size: Int
    ) throws(BlockError) -> DirtyBitmap {
        // Whatever the size: there will be no bits.
        let bitmap = try DirtyBitmap(name: name, granularity: granularity, size: 0)
        bitmap.becomeInconsistent()
        bitmap.size = size
        return bitmap
    }

    // MARK: Loading

    /// Leaves the bits where they are stored until ``load()``. For who puts it on a node that is
    /// read-only; until then all bits count as set.
    public func loadLater(_ source: @escaping () async throws(BlockError) -> ClusterBitmap) {
        bits = ClusterBitmap(count: bits.count, repeating: true)
        self.source = source
    }

    /// Brings the bits into memory. Comes before every question about them, where the bitmap may be of a
    /// node that is read-only. What cannot be read leaves the bitmap inconsistent: see ``check(_:)``.
    public func load() async {
        guard let source else { return }
        do throws(BlockError) {
            let stored = try await source()
            guard self.source != nil, stored.count == bits.count else { return }
            bits = stored
        } catch {
            guard self.source != nil else { return }
            becomeInconsistent()
        }
        self.source = nil
    }

    // MARK: Changes

    /// Whether changes of the node are recorded.
    public var isRecording: Bool { isEnabled && !isInconsistent }

    public func changed(_ range: ByteRange) {
        guard isRecording, let units = units(touching: range) else { return }
        if newer == nil { bits.set(units) } else { newer?.set(units) }
    }

    /// Marks what lies within the bitmap, whether it records or not.
    public func mark(_ range: ByteRange) {
        if let units = units(touching: range) { bits.set(units) }
    }

    /// Clears the units that lie within `range` whole; the end of the node ends one.
    public func clear(_ range: ByteRange) {
        guard let touched = units(touching: range) else { return }
        let first = touched.lowerBound + (range.offset.isAligned(to: granularity) ? 0 : 1)
        let end = range.end >= size ? bits.count : range.end / granularity
        if first < end { bits.clear(first..<end) }
    }

    /// Clears all.
    public func clear() {
        bits.clear(0..<bits.count)
    }

    /// `nil` where there is none, and where bits say nothing.
    private func units(touching range: ByteRange) -> Range<Int>? {
        guard !isInconsistent, let inside = range.intersection(ByteRange(0, size)) else {
            return nil
        }
        return inside.offset / granularity..<(inside.end - 1) / granularity + 1
    }

    /// Marks what is dirty in `other`, at this bitmap's granularity.
    ///
    /// - Throws: `invalidArgument` when they are of nodes of different sizes, `corrupt` when one of
    ///   them is inconsistent.
    public func merge(_ other: DirtyBitmap) throws(BlockError) {
        try check(.inconsistent)
        try other.check(.inconsistent)
        guard other.size == size else {
            throw BlockError(
                .invalidArgument,
                "the dirty bitmap '\(other.name)' is of \(other.size) bytes and cannot be merged "
                    + "into '\(name)' of \(size) bytes")
        }
        if other.granularity == granularity {
            bits.formUnion(other.bits)
        } else {
            other.forEachDirtyRange { mark($0) }
        }
    }

    /// Follows the node to another size. Bytes that appear are dirty where changes are recorded: they
    /// read otherwise than what a copy made earlier has there.
    ///
    /// A size that no bitmap of this granularity can cover leaves it inconsistent.
    public func resize(to size: Int) {
        guard size != self.size, !isInconsistent else {
            self.size = size
            return
        }
        guard let count = ClusterBitmap.count(covering: size, unit: granularity) else {
            self.size = size
            return becomeInconsistent()
        }
        let old = self.size
        self.size = size
        bits.resize(to: count)
        newer?.resize(to: count)
        if size > old { changed(ByteRange(from: old, to: size)) }
    }

    /// From here on its bits say nothing; it can be removed only.
    public func becomeInconsistent() {
        isInconsistent = true
        isEnabled = false
        bits = ClusterBitmap(count: 0)
        newer = nil
    }

    // MARK: Questions

    /// Bytes that are marked, counted in whole units.
    public var dirtyBytes: Int { bits.setCount.multiplied(by: granularity) ?? size }

    /// Whether the unit at `offset` is marked, and where that run of units ends.
    public func run(at offset: Int) -> (isDirty: Bool, end: Int) {
        precondition(offset >= 0 && offset < size)
        guard !isInconsistent else { return (false, size) }
        let index = offset / granularity
        let isDirty = bits[index]
        let rest = index..<bits.count
        let end = isDirty ? bits.firstClear(in: rest) : bits.firstSet(in: rest)
        return (isDirty, end.map { min($0 * granularity, size) } ?? size)
    }

    /// The first offset in `range` that is marked.
    public func nextDirty(in range: ByteRange) -> Int? {
        guard let units = units(touching: range) else { return nil }
        return bits.firstSet(in: units).map { max($0 * granularity, range.offset) }
    }

    /// The first offset in `range` that is not marked.
    public func nextClean(in range: ByteRange) -> Int? {
        guard let units = units(touching: range) else { return nil }
        return bits.firstClear(in: units).map { max($0 * granularity, range.offset) }
    }

    /// The first marked run in `range`, as far as it reaches in it.
    public func nextDirtyRange(in range: ByteRange) -> ByteRange? {
        guard let units = units(touching: range), let run = bits.firstRun(in: units) else {
            return nil
        }
        let start = max(run.lowerBound * granularity, range.offset)
        let end = run.upperBound.multiplied(by: granularity) ?? size
        return ByteRange(from: start, to: min(end, range.end, size))
    }

    public func forEachDirtyRange(_ body: (ByteRange) -> Void) {
        var offset = 0
        while offset < size,
            let range = nextDirtyRange(in: ByteRange(from: offset, to: size))
        {
            body(range)
            offset = range.end
        }
    }

    // MARK: Bits

    /// All bits, as they are stored: those of changes since ``split()`` with them. Setting them is for
    /// who undoes something, or loads them; they are as many as there were.
    public var contents: ClusterBitmap {
        get {
            guard let newer else { return bits }
            var all = bits
            all.formUnion(newer)
            return all
        }
        set {
            precondition(newValue.count == bits.count && newer == nil)
            bits = newValue
        }
    }

    // MARK: Users

    /// Splits the changes from here on from those before: questions are answered by those before, as
    /// a job that works them off wants it. ``join(droppingOlder:)`` ends it.
    ///
    /// For a persistent bitmap ``BlockNode/willChange()`` comes first.
    public func split() {
        precondition(newer == nil, "a dirty bitmap is split once at a time")
        newer = ClusterBitmap(count: bits.count)
    }

    /// Ends ``split()``: the changes since are kept, and with them those before, unless they were
    /// worked off.
    public func join(droppingOlder: Bool) {
        guard let later = newer else { return }
        newer = nil
        if droppingOlder { bits = later } else { bits.formUnion(later) }
    }

    public var isBusy: Bool { !users.isEmpty }

    /// Makes `user` one that relies on it.
    public func hold(for user: String) {
        users.append(user)
    }

    public func release(from user: String) {
        if let index = users.firstIndex(of: user) { users.remove(at: index) }
    }

    /// What stands against an operation on a dirty bitmap.
    public struct Obstacles: OptionSet, Sendable {
        public let rawValue: UInt8
        public init(rawValue: UInt8) { self.rawValue = rawValue }
        public static let busy = Obstacles(rawValue: 1)
        public static let readOnly = Obstacles(rawValue: 2)
        public static let inconsistent = Obstacles(rawValue: 4)
        public static let all: Obstacles = [.busy, .readOnly, .inconsistent]
    }

    /// - Throws: `busy` naming the user, `readOnly` or `corrupt`, where one of `obstacles` is there.
    public func check(_ obstacles: Obstacles = .all) throws(BlockError) {
        if obstacles.contains(.busy), let user = users.first {
            throw BlockError(.busy, "the dirty bitmap '\(name)' is in use by \(user)")
        }
        if obstacles.contains(.readOnly), isReadOnly {
            throw BlockError(
                .readOnly, "the dirty bitmap '\(name)' is in an image that is open read-only")
        }
        if obstacles.contains(.inconsistent), isInconsistent {
            throw BlockError(
                .corrupt,
                "the dirty bitmap '\(name)' is inconsistent: its image was not closed in order",
                remedy: "remove it, add it anew, and begin with a full backup")
        }
    }
}
