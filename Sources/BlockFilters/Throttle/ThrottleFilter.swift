import BlockCore
import BlockGraph
import BlockIO

/// `throttle`: holds requests back so that all nodes of a `throttle-group` together keep its limits.
///
/// Reads count as reads; writes, zeroes and discards as writes, by their length. Flushes and questions
/// never wait. While the graph around the node is drained nothing waits here.
public final class ThrottleFilter: FilterDriver, @unchecked Sendable {
    public let child: Edge
    public private(set) var group: ThrottleGroup
    private let member: ThrottleMember

    private init(
        _ node: BlockNode, _ child: Edge, _ group: ThrottleGroup
    ) throws(BlockError) {
        self.child = child
        self.group = group
        member = ThrottleMember(node.name)
        node.size = child.size
        node.limits = child.node.limits
        try group.add(member, on: node.thread)
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> ThrottleFilter {
        guard let name = try opening.options.string("throttle-group") else {
            throw BlockError(
                .invalidArgument, "option 'throttle-group' is missing",
                remedy: "name a throttle-group object")
        }
        _ = try group(name, in: opening.graph)
        let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
        // Looked up again: it may have gone while the child was opened.
        return try ThrottleFilter(opening.node, child, try group(name, in: opening.graph))
    }

    private static func group(
        _ name: String, in graph: BlockGraph
    ) throws(BlockError) -> ThrottleGroup {
        guard let group = graph.object(name) as? ThrottleGroup else {
            throw BlockError(
                .notFound, "there is no throttle group '\(name)'",
                remedy: "add an object throttle-group,id=\(name) first")
        }
        return group
    }

    // MARK: Requests

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        await group.admit(member, .read, bytes: vector.count)
        try await child.read(offset, into: vector, flags)
    }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        await group.admit(member, .write, bytes: vector.count)
        try await child.write(offset, from: vector, flags)
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        await group.admit(member, .write, bytes: range.count)
        try await child.writeZeroes(range, flags)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        await group.admit(member, .write, bytes: range.count)
        try await child.discard(range)
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        try await child.resize(to: size, preallocation)
    }

    // MARK: Drain

    public func drainBegins() {
        member.beginDrain()
        group.release(member)
    }

    public func drainEnds() {
        member.endDrain()
    }

    // MARK: Thread

    public func checkMove(with nodes: [BlockNode]) throws(BlockError) {
        try group.checkMove(with: nodes)
    }

    public func moves(to thread: IOThread) {
        // Its first node takes it along.
        if group.seat.thread !== thread { group.seat.move(to: thread) }
    }

    public func close() async throws(BlockError) {
        group.remove(member)
    }
}

extension ThrottleFilter {
    public static let driver = DriverDescription(
        name: "throttle", kind: .filter,
        open: { opening throws(BlockError) in try await ThrottleFilter.open(opening) })
}
