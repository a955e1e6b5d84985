import BlockCore
import BlockGraph
import BlockIO

/// `blkverify`: does everything to two images, and compares what they say.
///
///     user ──▶ blkverify ──test──▶ the image whose driver is under test
///                   └─────raw────▶ the same bytes in a plain image
///
/// Reads return what `test` holds; where `raw` holds something else they fail, and say where.
/// Changes that overlap are made one after the other, and no read sees half of one, so that both
/// images see the same order.
public final class BlockVerifyFilter: FilterDriver, @unchecked Sendable {
    private let node: BlockNode
    /// The filtered child: `raw`.
    public let child: Edge
    private let test: Edge
    private let locks = RangeLocks()

    private init(_ node: BlockNode, raw: Edge, test: Edge) {
        self.node = node
        child = raw
        self.test = test
        node.size = test.size
        takeLimits()
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> BlockVerifyFilter {
        let raw = try await opening.requiredChild("raw", roles: [.filtered, .primary])
        let test = try await opening.requiredChild("test", roles: .data)
        guard raw.size >= test.size else {
            throw BlockError(
                .invalidArgument,
                "'\(raw.node.name)' (\(raw.size) bytes) is smaller than '\(test.node.name)' "
                    + "(\(test.size) bytes)", remedy: "make both of the same size")
        }
        return BlockVerifyFilter(opening.node, raw: raw, test: test)
    }

    private func takeLimits() {
        var limits = child.node.limits
        let other = test.node.limits
        limits.requestAlignment = max(limits.requestAlignment, other.requestAlignment)
        limits.memoryAlignment = max(limits.memoryAlignment, other.memoryAlignment)
        limits.transferMax = min(limits.transferMax, other.transferMax)
        node.limits = limits
    }

    public func access(to edge: Edge, for users: Access) -> Access { users }

    public func childResized(_ edge: Edge) {
        node.size = min(test.size, child.size)
    }

    // MARK: Requests

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        let hold = offset..<(offset + vector.count)
        await locks.lock(hold, exclusively: false)
        defer { locks.unlock(hold, exclusively: false) }
        let other = try IOVector(allocating: vector.count)
        try await both { edge throws(BlockError) in
            try await edge.read(offset, into: edge === test ? vector : other, flags)
        }
        // Copies: a tool for tests may take its time.
        let (tested, plain) = (vector.array, other.array)
        guard tested != plain else { return }
        let index = tested.indices.first { tested[$0] != plain[$0] } ?? 0
        throw BlockError(
            .corrupt,
            "blkverify: byte \(offset + index) is \(tested[index]) in '\(test.node.name)' and "
                + "\(plain[index]) in '\(child.node.name)'", node: node.name)
    }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await change(ByteRange(offset, vector.count)) { edge throws(BlockError) in
            try await edge.write(offset, from: vector, flags)
        }
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        // Written as data: that is the same to both.
        throw BlockError(.unsupported, "blkverify writes zeroes as data")
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        // Afterwards the two may well differ, and both be right.
        throw BlockError(.unsupported, "blkverify discards nothing")
    }

    public func flush() async throws(BlockError) {
        try await both { edge throws(BlockError) in try await edge.flush() }
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        let whole = ByteRange(0, max(size, node.size))
        try await change(whole) { edge throws(BlockError) in
            try await edge.resize(to: size, preallocation)
        }
        node.size = min(test.size, child.size)
    }

    private func change(
        _ range: ByteRange, _ body: (Edge) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        let hold = range.offset..<range.end
        await locks.lock(hold, exclusively: true)
        defer { locks.unlock(hold, exclusively: true) }
        try await both(body)
    }

    /// - Throws: what `test` fails with; or `raw`, where it alone does.
    private func both(
        _ body: (Edge) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        var failure: BlockError?
        do throws(BlockError) { try await body(child) } catch {
            failure = error.doing("blkverify: '\(child.node.name)' alone failed")
        }
        try await body(test)
        if let failure { throw failure }
    }

    public var filename: String {
        "blkverify:\(child.node.driver.filename):\(test.node.driver.filename)"
    }
}

extension BlockVerifyFilter {
    public static let driver = DriverDescription(
        name: "blkverify", kind: .filter,
        open: { opening throws(BlockError) in try await BlockVerifyFilter.open(opening) })
}
