import BlockCore
import BlockIO

/// Someone outside the graph who uses a node: an export, a job, an image command.
public protocol NodeUser: AnyObject {
    /// As errors and queries name it: `"NBD export 'disk'"`.
    var userDescription: String { get }
    /// The node has another size now.
    func nodeResized(_ edge: Edge)
    /// Somebody was told the node's size and holds to it, where the user does not share resizing.
    var reliesOnSize: Bool { get }

    /// The node, drained, is to go on on another thread, together with `nodes`, all that it is joined to.
    ///
    /// - Throws: why the user cannot follow it: the default, for one that does not say otherwise.
    func checkMove(with nodes: [BlockNode]) throws(BlockError)
    /// It goes on there, and the user too: what it has that belongs to a thread goes along.
    ///
    /// - Returns: the seats of its tasks, for the caller to move when all else is done.
    func moves(to thread: IOThread) -> [IOSeat]
}

extension NodeUser {
    public func nodeResized(_ edge: Edge) {}
    public var reliesOnSize: Bool { true }

    public func checkMove(with nodes: [BlockNode]) throws(BlockError) {
        throw BlockError(.busy, "\(userDescription) uses it and cannot move along")
    }
    public func moves(to thread: IOThread) -> [IOSeat] { [] }
}

/// A plain user with a name.
public final class NamedUser: NodeUser {
    public let userDescription: String
    public init(_ description: String) {
        userDescription = description
    }
}

/// One use of a node: by a parent node, or by a user outside the graph.
///
/// Every request crosses an edge, by the methods in `Edge+Requests.swift`, which check it. An edge is
/// confined to the graph's thread.
///
/// Edges of users are where requests are counted and held back: draining a node closes the gates of
/// all users above it and waits until none of their requests is in flight.
public final class Edge: @unchecked Sendable {
    public enum Parent {
        case node(BlockNode)
        case user(any NodeUser)
    }

    public let parent: Parent
    /// What the parent calls the child: `file`, `backing`, `target`, `root`…
    public let name: String
    public let roles: ChildRole
    /// The child. Changed by graph transactions only.
    public internal(set) var node: BlockNode
    /// What the parent does with the child and lets others do. Changed by transactions only.
    public internal(set) var access: Access
    /// What a user outside asked for; a parent node's access follows from its driver.
    let requestedAccess: Access
    let isRoot: Bool

    // Of roots only.
    var inFlight = 0
    var gateCount = 0
    private var isRefusing = false
    var gateSleepers: [UnsafeContinuation<Void, Never>] = []
    var drainSleepers: [UnsafeContinuation<Void, Never>] = []
    /// The drivers that were told of a drain because the user leaves; see ``BlockGraph/beginDetach(_:)``.
    var drainedForDetach: [any BlockDriver] = []
    /// Every write of this user is on stable storage before it completes (cache mode writethrough).
    public var isWriteThrough = false
    /// Counts and latencies of a user's requests.
    public var statistics = RequestStatistics()

    init(parent: Parent, name: String, roles: ChildRole, node: BlockNode, requestedAccess: Access) {
        self.parent = parent
        self.name = name
        self.roles = roles
        self.node = node
        self.requestedAccess = requestedAccess
        access = .none
        if case .user = parent { isRoot = true } else { isRoot = false }
    }

    public var parentNode: BlockNode? {
        if case .node(let node) = parent { return node }
        return nil
    }

    /// Who uses the node, for errors: `"node 'top' (as 'backing')"`, `"NBD export 'disk'"`.
    public var parentDescription: String {
        switch parent {
        case .node(let node): "node '\(node.name)' (as '\(name)')"
        case .user(let user): user.userDescription
        }
    }

    /// The size of the node behind the edge.
    @inline(__always)
    public var size: Int { node.size }

    // MARK: Gate

    /// Counts a user's request in; waits while the graph below is drained.
    @inline(__always)
    func enter() async {
        if gateCount > 0 { await waitAtGate() }
        inFlight += 1
    }

    private func waitAtGate() async {
        while gateCount > 0, !isRefusing {
            await withUnsafeContinuation { gateSleepers.append($0) }
        }
    }

    @inline(__always)
    func leave() {
        inFlight -= 1
        if inFlight == 0, !drainSleepers.isEmpty { wakeDrain() }
    }

    private func wakeDrain() {
        let woken = drainSleepers
        drainSleepers = []
        for continuation in woken { continuation.resume() }
    }

    func closeGate() {
        gateCount += 1
    }

    func openGate() {
        gateCount -= 1
        guard gateCount == 0 else { return }
        let woken = gateSleepers
        gateSleepers = []
        for continuation in woken { continuation.resume() }
    }

    /// Refuses all that the user asks for from here on, and what waits at the gate: for one that leaves
    /// while the graph is drained, whose requests would have to wait for the end of that.
    public func refuseRequests() {
        isRefusing = true
        access = .none
        let woken = gateSleepers
        gateSleepers = []
        for continuation in woken { continuation.resume() }
    }

    func untilIdle() async {
        while inFlight > 0 {
            await withUnsafeContinuation { drainSleepers.append($0) }
        }
    }
}
