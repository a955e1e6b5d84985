import BlockCore
import BlockGraph

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// `rebase`: gives an image another backing image.
///
/// The safe way, the default, keeps the image's contents: where it has no data of its own and the two
/// backing images differ, the old one's data is copied into it and made durable; then the name changes.
/// The unsafe way changes the name alone.
public struct ImageRebase: Sendable {
    public var source: ImageSource
    /// As the image is to name it; `nil` or empty for none.
    public var backing: String?
    public var backingFormat: String?
    /// Change the name and look at nothing.
    public var isUnsafe = false
    public var backingCache = CacheMode.writeback
    public var compresses = false

    public init(_ source: ImageSource) {
        self.source = source
    }

    private var newName: String? { backing.flatMap { $0.isEmpty ? nil : $0 } }

    public func run(in session: ToolSession, progress: Progress) async throws(BlockError) {
        guard isUnsafe || backing != nil else {
            throw BlockError(
                .invalidArgument, "the new backing image is missing",
                remedy: "give it with -b, \"\" for none")
        }
        if newName != nil, backingFormat == nil {
            throw BlockError(
                .invalidArgument, "a backing image needs its format", remedy: "give it with -F")
        }
        if let backingFormat { _ = try ToolSession.registry.driver(named: backingFormat) }
        if isUnsafe {
            try await renameOnly(in: session)
        } else {
            try await rebase(in: session, progress)
        }
    }

    private func renameOnly(in session: ToolSession) async throws(BlockError) {
        var image = source
        image.withoutBacking = true
        image.isWritable = true
        let user = try await session.use(
            image, as: "rebase", Access(uses: [.consistentRead, .write], shares: .consistentRead))
        try await setBacking(user)
        try await session.graph.detach(user)
    }

    private func setBacking(_ user: Edge) async throws(BlockError) {
        try await Self.image(user.node).setBacking(
            name: newName, format: newName == nil ? nil : backingFormat)
    }

    private static func image(_ node: BlockNode) throws(BlockError) -> any BackedImage {
        guard let image = node.driver as? any BackedImage else {
            throw BlockError(
                .unsupported, "images of format '\(node.description.name)' have no backing images",
                remedy: "use a qcow2 image")
        }
        return image
    }

    // MARK: Safe

    private func rebase(in session: ToolSession, _ progress: Progress) async throws(BlockError) {
        let chain = try await ImageChain.open(source, in: session) { _ in [0] }
        let user = try session.graph.attach(
            NamedUser("rebase"), to: chain.top,
            Access(uses: [.consistentRead, .write], shares: .all))
        user.isWriteThrough = source.cache.isWriteThrough
        _ = try Self.image(chain.top)
        // As seen from where the command runs.
        let path = newName.map { ImageName.resolve($0, besides: chain.images[0].info.filename) }
        let new = try await openNew(path, chain, in: session)
        // What that layer of the old chain and those below have is the same then.
        let same = path.flatMap { chain.index(ofImageAt: $0, format: backingFormat) }
        let work = Rebasing(user, over: new, same: same, compresses: compresses, progress)
        try await work.run()
        try await user.flush()
        try await setBacking(user)
        progress.finish()
        try await session.graph.detach(user)
        if let new { try await session.graph.detach(new) }
        try await session.close(chain)
    }

    private func openNew(
        _ path: String?, _ chain: ImageChain, in session: ToolSession
    ) async throws(BlockError) -> Edge? {
        guard let path else { return nil }
        guard path != chain.images[0].info.filename else {
            throw BlockError(.invalidArgument, "an image cannot be its own backing image")
        }
        var new = ImageSource(path, format: backingFormat)
        new.cache = backingCache
        new.sharesAll = source.sharesAll
        do throws(BlockError) {
            return try await session.use(new, as: "rebase")
        } catch {
            throw error.doing("cannot open the new backing image '\(path)'")
        }
    }
}

/// A safe rebase under way. Confined to the session's thread.
///
/// Parts do not overlap, and each is aligned to the image's clusters: what several workers write does not
/// change what the others look at.
private final class Rebasing: @unchecked Sendable {
    private static let workerCount = 8
    private static let partBytesMax = 1 << 20

    private let image: Edge
    private let new: Edge?
    private let same: Int?
    private let cluster: Int
    private let flags: WriteFlags
    private let progress: Progress
    private let walk = WalkLock()
    private let walks: (old: StatusWalk, new: StatusWalk?)
    private var offset = 0

    init(_ image: Edge, over new: Edge?, same: Int?, compresses: Bool, _ progress: Progress) {
        self.image = image
        self.new = new
        walks = (StatusWalk(image), new.map { StatusWalk($0) })
        self.same = same
        self.progress = progress
        flags = compresses ? .compressed : []
        let unit = image.node.limits.allocationUnit
        cluster = unit.isPowerOfTwo && unit <= Self.partBytesMax << 1 ? max(unit, 512) : 512
    }

    func run() async throws(BlockError) {
        progress.begin(image.size)
        try await Workers.run(Self.workerCount, on: image.node.thread) {
            () async throws(BlockError) in
            guard let part = try await self.next() else { return false }
            try await self.carry(part)
            self.progress.advance(part.count)
            return true
        }
    }

    /// The next part in which the two backing images may differ and the image has nothing.
    private func next() async throws(BlockError) -> ByteRange? {
        await walk.lock()
        defer { walk.unlock() }
        while offset < image.size {
            let start = offset
            let old = try await walks.old.run(at: start, limit: image.size)
            var end = start + old.count
            var isSame = old.depth == 0 || (same.map { $0 <= old.depth ?? .max } ?? false)
            if !isSame, old.flags.contains(.zero) {
                let below = try await newStatus(start, end)
                end = min(end, below.end)
                isSame = below.isZero
            }
            if isSame {
                // An image's own clusters are whole; a run that ends within one goes on in the next part.
                let stop = end == image.size ? end : end.roundedDown(to: cluster)
                if stop > start {
                    offset = stop
                    progress.advance(stop - start)
                    continue
                }
            }
            let limit = min(image.size, start + max(Self.partBytesMax, cluster))
            offset = min(limit, end.roundedUp(to: cluster) ?? limit)
            return ByteRange(from: start, to: offset)
        }
        return nil
    }

    private func newStatus(
        _ start: Int, _ end: Int
    ) async throws(BlockError) -> (isZero: Bool, end: Int) {
        guard let new, let walk = walks.new, start < new.size else { return (true, end) }
        let status = try await walk.run(at: start, limit: min(end, new.size))
        return (status.flags.contains(.zero), start + status.count)
    }

    /// Copies the clusters that differ.
    private func carry(_ part: ByteRange) async throws(BlockError) {
        let old = try IOVector(allocating: part.count)
        try await image.read(part.offset, into: old)
        let below = try IOVector(allocating: part.count)
        let there = max(0, min(part.count, (new?.size ?? 0) - part.offset))
        if there > 0, let new { try await new.read(part.offset, into: below.slice(0, there)) }
        if there < part.count { below.zero(there, part.count - there) }
        guard let oldBytes = old.single?.bytes, let newBytes = below.single?.bytes else { return }
        var done = 0
        while done < part.count {
            let end = Self.clustersAlike(oldBytes, newBytes, from: done, cluster)
            if end.differ {
                try await write(
                    ByteRange(from: part.offset + done, to: part.offset + end.offset),
                    old.slice(done, end.offset - done))
            }
            done = end.offset
        }
    }

    private func write(_ range: ByteRange, _ vector: IOVector) async throws(BlockError) {
        // A cluster that is the image's own is the same in both views, but has no need to be written again.
        if try await isOwn(range) { return }
        if vector.isZero {
            try await image.writeZeroes(range)
            // Where the old backing image has nothing, that had no effect; the new one would show through.
            if try await isOwn(range) { return }
        }
        try await image.write(range.offset, from: vector, vector.isZero ? [] : flags)
    }

    /// Whether the image itself has all of the range.
    private func isOwn(_ range: ByteRange) async throws(BlockError) -> Bool {
        var offset = range.offset
        while offset < range.end {
            let status = try await image.blockStatus(ByteRange(from: offset, to: range.end))
            guard status.flags.contains(.allocated) else { return false }
            offset += status.count
        }
        return true
    }

    /// How far clusters from `start` on differ, or do not.
    private static func clustersAlike(
        _ old: UnsafeMutableRawBufferPointer, _ new: UnsafeMutableRawBufferPointer,
        from start: Int, _ cluster: Int
    ) -> (differ: Bool, offset: Int) {
        guard let a = old.baseAddress, let b = new.baseAddress else { return (false, old.count) }
        func differs(_ offset: Int) -> Bool {
            memcmp(a + offset, b + offset, min(cluster, old.count - offset)) != 0
        }
        let first = differs(start)
        var offset = min(start + cluster, old.count)
        while offset < old.count, differs(offset) == first {
            offset = min(offset + cluster, old.count)
        }
        return (first, offset)
    }
}
