import BlockCore
import BlockGraph
import BlockIO

/// `copy-on-read`: what is read and comes from a backing image is written into the image above it, so
/// that the next read finds it there.
///
///     read ──▶ copy-on-read ──file──▶ overlay ──▶ … ──▶ bottom ──▶ base
///                                        ▲              │           not copied: below `bottom`
///                                        └──── copied ◀─┘
///
/// Invariants:
/// 1. A cluster is copied under an exclusive hold of its bytes; a user's change has a shared one. So no
///    copy writes old data over new, and nobody else writes to the child past this node.
/// 2. What users read stays the same: copies need the `write-unchanged` permission only.
public final class CopyOnRead: FilterDriver, @unchecked Sendable {
    private static let chunkBytesMax = 1 << 20
    private static let holdReason = "bottom of copy-on-read"

    private let node: BlockNode
    public let child: Edge
    /// The lowest layer that is copied from; `nil`: all are.
    private let bottom: BlockNode?
    /// Copies are of whole units of this many bytes.
    private let unit: Int
    private let locks = RangeLocks()
    public private(set) var copiedBytes = 0

    private init(_ node: BlockNode, _ child: Edge, bottom: BlockNode?, unit: Int) {
        self.node = node
        self.child = child
        self.bottom = bottom
        self.unit = unit
        node.size = child.size
        node.limits = child.node.limits
        bottom?.hold(Self.holdReason)
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> CopyOnRead {
        let bottomName = try opening.options.string("bottom")
        let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
        guard !child.node.isReadOnly else {
            throw BlockError(
                .readOnly, "'\(child.node.name)' is read-only: nothing can be copied into it",
                remedy: "open it with read-only=off")
        }
        var bottom: BlockNode?
        if let bottomName {
            let named = try opening.graph.requireNode(named: bottomName)
            guard named.description.kind != .filter else {
                throw BlockError(
                    .invalidArgument, "'bottom' cannot be the filter '\(bottomName)'",
                    remedy: "name the image below it")
            }
            guard layer(of: named, below: child.node) != nil else {
                throw BlockError(
                    .invalidArgument,
                    "'\(bottomName)' is not in the backing chain of '\(child.node.name)'")
            }
            bottom = named
        }
        let cluster = try await child.node.driver.information.clusterSize
        let unit = max(cluster, child.node.limits.requestAlignment)
        return CopyOnRead(
            opening.node, child, bottom: bottom,
            unit: unit.isPowerOfTwo ? unit : child.node.limits.requestAlignment)
    }

    /// How many layers `bottom` is below `top`, filters not counted; `nil` where it is not there.
    private static func layer(of bottom: BlockNode, below top: BlockNode) -> Int? {
        var node = top
        var depth = 0
        while true {
            while node.description.kind == .filter, let filtered = node.filteredChild {
                node = filtered.node
            }
            if node === bottom { return depth }
            guard let backing = node.backing else { return nil }
            node = backing.node
            depth += 1
        }
    }

    // MARK: Access

    public func access(to edge: Edge, for users: Access) -> Access {
        // Nobody uses the node yet: it is about to be put in the place of its child.
        if node.parents.isEmpty { return .none }
        var access = users
        access.uses.insert(.writeUnchanged)
        access.shares.remove(.write)
        return access
    }

    // MARK: Reading

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        // Worked out anew: layers come and go.
        let bottomLayer = bottom.flatMap { Self.layer(of: $0, below: child.node) }
        var done = 0
        while done < vector.count {
            let rest = ByteRange(offset + done, vector.count - done)
            let status = try await child.chainStatus(rest, precise: false)
            let part = ByteRange(rest.offset, min(status.count, rest.count))
            let target = vector.slice(done, part.count)
            if isCopied(status, bottomLayer) {
                try await copy(part, bottomLayer, into: target)
            } else if !flags.contains(.prefetch) {
                try await child.read(part.offset, into: target, flags)
            }
            done += part.count
        }
    }

    /// Whether a run comes from a layer that is copied from.
    private func isCopied(_ status: BlockStatus, _ bottomLayer: Int?) -> Bool {
        if status.depth == 0 { return false }
        guard let bottomLayer else { return true }
        return status.depth.map { $0 <= bottomLayer } ?? false
    }

    /// Copies the units around `range` and gives out its bytes.
    private func copy(
        _ range: ByteRange, _ bottomLayer: Int?, into vector: IOVector
    ) async throws(BlockError) {
        let chunk = max(unit, Self.chunkBytesMax.roundedDown(to: unit))
        var offset = range.offset
        while offset < range.end {
            let start = offset.roundedDown(to: unit)
            let wanted = ByteRange(from: offset, to: min(range.end, start + chunk))
            let end = wanted.end.roundedUp(to: unit).map { min($0, child.size) } ?? child.size
            let around = ByteRange(from: start, to: max(end, wanted.end))
            let memory = try IOVector(allocating: around.count)
            let hold = around.offset..<around.end
            await locks.lock(hold, exclusively: true)
            do throws(BlockError) {
                try await child.read(around.offset, into: memory)
                try await write(around, memory, bottomLayer)
            } catch {
                locks.unlock(hold, exclusively: true)
                throw error
            }
            locks.unlock(hold, exclusively: true)
            vector.slice(wanted.offset - range.offset, wanted.count)
                .copy(from: memory.slice(wanted.offset - around.offset, wanted.count))
            offset = wanted.end
        }
    }

    /// Writes those parts of `range` that the child still does not have.
    private func write(
        _ range: ByteRange, _ memory: IOVector, _ bottomLayer: Int?
    ) async throws(BlockError) {
        var done = 0
        while done < range.count {
            let rest = ByteRange(range.offset + done, range.count - done)
            let status = try await child.chainStatus(rest, precise: false)
            let part = ByteRange(rest.offset, min(status.count, rest.count))
            if isCopied(status, bottomLayer) {
                let data = memory.slice(done, part.count)
                await child.reached(.corWrite)
                if data.isZero {
                    try await child.writeZeroes(part, .unchanged)
                } else {
                    try await child.write(part.offset, from: data, .unchanged)
                }
                copiedBytes += part.count
            }
            done += part.count
        }
    }

    // MARK: Changes

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await holding(ByteRange(offset, vector.count)) { () throws(BlockError) in
            try await child.write(offset, from: vector, flags)
        }
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await holding(range) { () throws(BlockError) in
            try await child.writeZeroes(range, flags)
        }
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await holding(range) { () throws(BlockError) in try await child.discard(range) }
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        try await holding(ByteRange(0, max(size, child.size))) { () throws(BlockError) in
            try await child.resize(to: size, preallocation)
        }
    }

    private func holding(
        _ range: ByteRange, _ body: () async throws(BlockError) -> Void
    ) async throws(BlockError) {
        let hold = range.offset..<range.end
        await locks.lock(hold, exclusively: false)
        defer { locks.unlock(hold, exclusively: false) }
        try await body()
    }

    public func close() async throws(BlockError) {
        bottom?.release(Self.holdReason)
    }
}

extension CopyOnRead {
    public static let driver = DriverDescription(
        name: "copy-on-read", kind: .filter,
        open: { opening throws(BlockError) in try await CopyOnRead.open(opening) })
}
