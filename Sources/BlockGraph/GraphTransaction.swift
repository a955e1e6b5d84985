import BlockCore

/// Changes of the graph that all take effect, or none.
///
/// Steps change the links at once and remember how to undo themselves; `commit` then works out the
/// permissions of everything below what changed, lets every driver refuse, and only then puts them
/// into force. A step that throws, or a commit that does, leaves the graph as it was: order of
/// children and parents included.
///
/// Synchronous from the first step to the end, so that on the graph's thread nothing happens in
/// between. Requests in flight are the caller's: drain first where an edge changes its node.
public final class GraphTransaction {
    private let graph: BlockGraph
    private var undoSteps: [() -> Void] = []
    /// Where permissions must be worked out anew.
    private var touched: [BlockNode] = []
    /// Edges with the nodes that were behind them.
    private var replaced: [(edge: Edge, old: BlockNode)] = []
    private var isEnded = false

    public init(_ graph: BlockGraph) {
        graph.thread.preconditionOnThread()
        self.graph = graph
    }

    // MARK: Steps

    /// Adds a child to a node, or a user to a node.
    ///
    /// - Parameter access: what a user outside the graph wants; a node's wants follow from its driver.
    /// - Throws: `invalidArgument` when a loop would come about or the chain becomes too deep.
    public func attach(
        _ child: BlockNode, to parent: Edge.Parent, as name: String, roles: ChildRole = [],
        access: Access = .none
    ) throws(BlockError) -> Edge {
        try requireHere(child)
        if case .node(let node) = parent {
            guard !child.reaches(node) else {
                throw BlockError(
                    .invalidArgument,
                    "making '\(child.name)' a child of '\(node.name)' would close a loop")
            }
            guard child.height + node.depth + 1 < Limits.graphDepthMax else {
                throw BlockError(
                    .exhausted, "the chain of nodes is deeper than \(Limits.graphDepthMax)")
            }
            guard node.child(named: name) == nil else {
                throw BlockError(
                    .alreadyExists, "it has a child '\(name)' already", node: node.name)
            }
        }
        let edge = Edge(
            parent: parent, name: name, roles: roles, node: child, requestedAccess: access)
        link(edge)
        undoSteps.append { self.unlink(edge) }
        touched.append(child)
        if edge.isRoot { graph.joinDrains(edge) }
        return edge
    }

    /// Takes a child from its parent.
    public func detach(_ edge: Edge) {
        let child = edge.node
        let places = unlink(edge)
        undoSteps.append { self.link(edge, at: places) }
        touched.append(child)
    }

    /// Puts `node` in the place of the child behind `edge`.
    ///
    /// - Throws: `invalidArgument` when a loop would come about; `permissionDenied` when the node has
    ///   another size than users count on; what the parent's driver refuses with, or one above that relies
    ///   on the bytes that are there.
    public func replace(_ edge: Edge, with node: BlockNode) throws(BlockError) {
        let old = edge.node
        guard old !== node else { return }
        try requireHere(old)
        try requireHere(node)
        if let parent = edge.parentNode, parent.isOpen {
            try parent.driver.checkReplacement(of: edge, with: node)
        }
        if !edge.hasSameBytes(in: node) { try edge.checkOtherBytes() }
        try edge.checkSize(of: node)
        if let parent = edge.parentNode, node.reaches(parent) {
            throw BlockError(
                .invalidArgument,
                "putting '\(node.name)' below '\(parent.name)' would close a loop")
        }
        let index = old.parents.firstIndex { $0 === edge } ?? old.parents.endIndex
        old.parents.removeAll { $0 === edge }
        edge.node = node
        node.parents.append(edge)
        edge.parentNode?.deriveLinks()
        undoSteps.append {
            node.parents.removeAll { $0 === edge }
            edge.node = old
            old.parents.insert(edge, at: min(index, old.parents.count))
            edge.parentNode?.deriveLinks()
        }
        touched.append(old)
        touched.append(node)
        replaced.append((edge, old))
    }

    /// Has the permissions around `node` worked out anew at the commit: its driver or options
    /// changed.
    public func refresh(_ node: BlockNode) {
        touched.append(node)
    }

    /// Changes the options of a node; the caller tells its driver after the commit.
    public func setOptions(_ options: NodeOptions, of node: BlockNode) {
        let old = node.options
        node.options = options
        undoSteps.append { node.options = old }
        touched.append(node)
    }

    // MARK: End

    /// Puts the changes and their permissions into force.
    ///
    /// - Throws: `permissionDenied` naming both users of a conflict, or what a driver refuses with;
    ///   everything is as it was before the first step then.
    public func commit() throws(BlockError) {
        precondition(!isEnded, "a graph transaction ends once")
        isEnded = true
        let update = PermissionUpdate(around: touched)
        do throws(BlockError) {
            try update.check()
        } catch {
            undoAll()
            throw error
        }
        update.apply()
        for (edge, old) in replaced { edge.announceReplacement(of: old) }
        forget()
    }

    /// Undoes all steps.
    public func abort() {
        guard !isEnded else { return }
        isEnded = true
        undoAll()
    }

    private func undoAll() {
        for step in undoSteps.reversed() { step() }
        forget()
    }

    /// The steps keep the transaction in memory, as it keeps them, and all the nodes that they are about.
    private func forget() {
        undoSteps = []
        touched = []
        replaced = []
    }

    /// Joined nodes are on one thread.
    private func requireHere(_ node: BlockNode) throws(BlockError) {
        guard node.graph === graph else {
            throw BlockError(.busy, "the node is on another I/O thread", node: node.name)
        }
    }

    // MARK: Links

    private func link(_ edge: Edge, at places: (child: Int, parent: Int)? = nil) {
        if let parent = edge.parentNode {
            let index = places?.child ?? parent.children.endIndex
            parent.children.insert(edge, at: min(index, parent.children.endIndex))
            parent.deriveLinks()
        }
        let index = places?.parent ?? edge.node.parents.endIndex
        edge.node.parents.insert(edge, at: min(index, edge.node.parents.endIndex))
    }

    @discardableResult
    private func unlink(_ edge: Edge) -> (child: Int, parent: Int) {
        var childIndex = 0
        if let parent = edge.parentNode {
            childIndex = parent.children.firstIndex { $0 === edge } ?? 0
            parent.children.removeAll { $0 === edge }
            parent.deriveLinks()
        }
        let parentIndex = edge.node.parents.firstIndex { $0 === edge } ?? 0
        edge.node.parents.removeAll { $0 === edge }
        return (childIndex, parentIndex)
    }
}

extension BlockNode {
    /// Whether `other` is this node or below it.
    public func reaches(_ other: BlockNode) -> Bool {
        var seen = Set<ObjectIdentifier>()
        var rest = [self]
        while let node = rest.popLast() {
            if node === other { return true }
            guard seen.insert(ObjectIdentifier(node)).inserted else { continue }
            rest.append(contentsOf: node.children.map(\.node))
        }
        return false
    }

    /// Edges on the longest way down.
    var height: Int {
        longest { $0.children.map(\.node) }
    }

    /// Edges on the longest way up to a node that no node is above.
    var depth: Int {
        longest { $0.parents.compactMap(\.parentNode) }
    }

    /// The longest way along `next`, layer by layer: deep chains must not recurse.
    private func longest(_ next: (BlockNode) -> [BlockNode]) -> Int {
        var layer: [ObjectIdentifier: BlockNode] = [ObjectIdentifier(self): self]
        var count = -1
        while !layer.isEmpty, count <= Limits.graphDepthMax {
            count += 1
            var following: [ObjectIdentifier: BlockNode] = [:]
            for node in layer.values {
                for neighbour in next(node) { following[ObjectIdentifier(neighbour)] = neighbour }
            }
            layer = following
        }
        return count
    }
}
