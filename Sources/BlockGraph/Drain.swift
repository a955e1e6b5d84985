import BlockCore

/// One time of holding users back, in one graph or in several. Its part in each graph is a
/// ``DrainSection``; where nodes move meanwhile, their part goes with them.
public final class Drain: Sendable {
    public init() {}
}

/// Users of one graph that are held back while it changes.
public final class DrainSection {
    public let drain: Drain
    private(set) var nodes: [BlockNode]
    var roots: [Edge]
    /// The nodes, those above and those below, parents first: what may have work under way.
    private(set) var around: [BlockNode]
    /// A command waits for their requests, and others run meanwhile: nodes stay on their thread.
    var isWaiting = false
    /// The nodes whose drivers were told that the drain begins, and the drivers.
    private var told: [(node: BlockNode, driver: any BlockDriver)] = []

    init(_ nodes: [BlockNode], _ drain: Drain) {
        self.drain = drain
        self.nodes = nodes
        let above = Self.closure(of: nodes) { $0.parents.compactMap(\.parentNode) }
        roots = above.flatMap { $0.parents.filter(\.isRoot) }
        around = Self.closure(of: above) { $0.children.map(\.node) }
            .sorted { $0.depth < $1.depth }
    }

    private init(_ drain: Drain) {
        self.drain = drain
        nodes = []
        roots = []
        around = []
    }

    func begin() {
        told = around.filter(\.isOpen).map { ($0, $0.driver) }
        for entry in told { entry.driver.drainBegins() }
    }

    func end() {
        for entry in told { entry.driver.drainEnds() }
        told = []
    }

    /// Takes out what concerns nodes that leave the graph.
    ///
    /// - Returns: the section for the graph that they go to.
    func split(_ leaves: (BlockNode) -> Bool) -> DrainSection {
        let other = DrainSection(drain)
        other.nodes = nodes.filter(leaves)
        nodes.removeAll(where: leaves)
        other.around = around.filter(leaves)
        around.removeAll(where: leaves)
        other.told = told.filter { leaves($0.node) }
        told.removeAll { leaves($0.node) }
        other.roots = roots.filter { leaves($0.node) }
        roots.removeAll { leaves($0.node) }
        return other
    }

    /// The nodes and all that `next` leads to from them.
    static func closure(
        of nodes: [BlockNode], _ next: (BlockNode) -> [BlockNode]
    ) -> [BlockNode] {
        var result: [BlockNode] = []
        var seen = Set<ObjectIdentifier>()
        var rest = nodes
        while let node = rest.popLast() {
            guard seen.insert(ObjectIdentifier(node)).inserted else { continue }
            result.append(node)
            rest.append(contentsOf: next(node))
        }
        return result
    }
}

extension BlockGraph {
    /// Runs `body` while no request of a user is in flight in `nodes` or above them.
    public func drained<T>(
        _ nodes: [BlockNode], _ body: () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let section = await beginDrain(nodes)
        defer { endDrain(section) }
        return try await body()
    }

    /// Holds back all users of `nodes`, waits for their requests, and lets drivers settle.
    ///
    /// - Parameter drain: what the section is a part of, where several graphs are drained together.
    @discardableResult
    public func beginDrain(
        _ nodes: [BlockNode], as drain: Drain = Drain()
    ) async -> DrainSection {
        let section = holdRoots(of: nodes, drain)
        for edge in section.roots { await edge.untilIdle() }
        for node in section.around where node.isOpen { await node.driver.settle() }
        return section
    }

    /// ``beginDrain(_:as:)`` up to where it has to wait: ``untilIdle(_:)`` does that.
    ///
    /// - Returns: whether there is nothing to wait for: no request of theirs is in flight, no driver has work
    ///   under way.
    public func holdUsers(of nodes: [BlockNode], as drain: Drain) -> Bool {
        let section = holdRoots(of: nodes, drain)
        return section.roots.allSatisfy { $0.inFlight == 0 }
            && section.around.allSatisfy { !$0.isOpen || $0.driver.isSettled }
    }

    private func holdRoots(of nodes: [BlockNode], _ drain: Drain) -> DrainSection {
        thread.preconditionOnThread()
        let section = DrainSection(nodes, drain)
        drains.append(section)
        for edge in section.roots { edge.closeGate() }
        section.begin()
        return section
    }

    /// Waits for the requests of users that are held back, and for drivers to settle. Others may change the graph
    /// meanwhile; they may also end the drain.
    public func untilIdle(_ drain: Drain) async {
        thread.preconditionOnThread()
        let own = drains.filter { $0.drain === drain }
        for section in own { section.isWaiting = true }
        for edge in own.flatMap(\.roots) { await edge.untilIdle() }
        for node in own.flatMap(\.around) where node.isOpen { await node.driver.settle() }
        for section in own { section.isWaiting = false }
    }

    public func endDrain(_ section: DrainSection) {
        endDrain(section.drain)
    }

    /// Ends what this graph has of a drain: what it began with, and what came with nodes since.
    public func endDrain(_ drain: Drain) {
        thread.preconditionOnThread()
        let ended = drains.filter { $0.drain === drain }
        drains.removeAll { $0.drain === drain }
        for section in ended {
            section.end()
            for edge in section.roots { edge.openGate() }
        }
    }

    /// A user that comes while the graph below it is drained waits like the others.
    func joinDrains(_ edge: Edge) {
        for section in drains where section.nodes.contains(where: { edge.node.reaches($0) }) {
            edge.closeGate()
            section.roots.append(edge)
        }
    }
}

extension BlockNode {
    /// The node and all below it.
    var nodesBelow: [BlockNode] {
        DrainSection.closure(of: [self]) { $0.children.map(\.node) }
    }
}
