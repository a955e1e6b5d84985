import BlockCore
import BlockGraph
import BlockIO

/// `preallocate`: a file that grows gets more space than is asked for, so that the next times it grows
/// cost nothing. Stands between a format and its file.
///
///     0 ─────────── data end ────────── file end
///     what users see │ preallocated, not yet used; reads as zeroes
///
/// Invariants:
/// 1. `node.size` is the data end, and never above the file's end.
/// 2. Past the data end the file reads as zeroes: space is reserved, not written; and shrinking cuts it.
/// 3. One change of the file's size at a time (`sizing`).
/// 4. When the last user who could write leaves, and at the latest when the node closes, the file ends
///    where the data does.
public final class PreallocateFilter: FilterDriver, @unchecked Sendable {
    private let node: BlockNode
    public let child: Edge
    /// The file's end is a multiple of this.
    private let alignment: Int
    /// So much is reserved past what is asked for.
    private let reserve: Int
    private let sizing = RangeLocks()
    private var isSizing = false

    private init(_ node: BlockNode, _ child: Edge, alignment: Int, reserve: Int) {
        self.node = node
        self.child = child
        self.alignment = alignment
        self.reserve = reserve
        node.size = child.size
        node.limits = child.node.limits
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> PreallocateFilter {
        let alignment = try opening.options.size("prealloc-align") ?? 1 << 20
        let reserve = try opening.options.size("prealloc-size") ?? 128 << 20
        let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
        let unit = max(512, child.node.limits.requestAlignment)
        guard alignment > 0, alignment % unit == 0, alignment <= Limits.nodeSizeMax else {
            throw BlockError(
                .invalidArgument, "'prealloc-align' must be a multiple of \(unit), not \(alignment)"
            )
        }
        guard reserve <= Limits.nodeSizeMax else {
            throw BlockError(.invalidArgument, "'prealloc-size' is out of bounds: \(reserve)")
        }
        return PreallocateFilter(opening.node, child, alignment: alignment, reserve: reserve)
    }

    private var hasReserve: Bool { child.size > node.size }

    // MARK: Access

    public func access(to edge: Edge, for users: Access) -> Access {
        var access = users
        if !users.uses.isDisjoint(with: [.write, .resize]) || hasReserve {
            // What is reserved is this node's business alone.
            access.uses.formUnion([.write, .resize])
            access.shares.subtract([.write, .resize])
        }
        return access
    }

    public func applyAccess(_ access: Access) {
        guard hasReserve, access.uses.isDisjoint(with: [.write, .resize]) else { return }
        node.seat.spawn { [node] in
            try? await self.dropReserve()
            withExtendedLifetime(node) {}
        }
    }

    public func childResized(_ edge: Edge) {
        if !isSizing || edge.size < node.size { node.size = edge.size }
    }

    // MARK: Size

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        try await withSizing { () throws(BlockError) in
            if preallocation != .off || size <= node.size {
                // The reserve ends before what the caller wants to have reserved begins.
                if hasReserve, size > node.size { try await child.resize(to: node.size) }
                try await child.resize(to: size, preallocation)
            } else if size > child.size {
                try await grow(to: size)
            }
            node.size = size
        }
    }

    private func grow(to size: Int) async throws(BlockError) {
        if let reserved = reservedEnd(for: size) {
            do throws(BlockError) {
                try await child.resize(to: reserved, .falloc)
                return
            } catch  where error.code == .unsupported || error.code == .noSpace {
                // What was asked for may well be possible.
            }
        }
        try await child.resize(to: size)
    }

    private func reservedEnd(for size: Int) -> Int? {
        guard let end = size.adding(reserve), let above = end.adding(alignment - 1) else {
            return nil
        }
        let result = above / alignment * alignment
        return result <= Limits.nodeSizeMax ? result : nil
    }

    private func dropReserve() async throws(BlockError) {
        try await withSizing { () throws(BlockError) in
            if hasReserve { try await child.resize(to: node.size) }
        }
    }

    private func withSizing(
        _ body: () async throws(BlockError) -> Void
    ) async throws(BlockError) {
        await sizing.lock(0..<1, exclusively: true)
        isSizing = true
        defer {
            isSizing = false
            sizing.unlock(0..<1, exclusively: true)
        }
        try await body()
    }

    public func settle() async {
        await sizing.waitUntilFree(0..<1, exclusively: true)
    }
    public var isSettled: Bool { !sizing.conflicts(0..<1, exclusively: true) }

    public func close() async throws(BlockError) {
        try await dropReserve()
    }

    // MARK: Requests

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await child.write(offset, from: vector, flags)
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await child.writeZeroes(range, flags)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await child.discard(range)
    }
}

extension PreallocateFilter {
    public static let driver = DriverDescription(
        name: "preallocate", kind: .filter,
        open: { opening throws(BlockError) in try await PreallocateFilter.open(opening) })
}
