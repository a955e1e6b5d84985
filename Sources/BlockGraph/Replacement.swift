import BlockCore

// What may take a child's place, and what its parent has to be told.

extension BlockNode {
    /// The node whose bytes these are: below all that only hands them on.
    var origin: BlockNode {
        var node = self
        while let child = node.description.kind == .filter
            ? node.filteredChild : node.driver.wholeChild
        {
            node = child.node
        }
        return node
    }
}

extension Edge {
    /// Whether `other` has the same bytes as the child.
    func hasSameBytes(in other: BlockNode) -> Bool {
        let (origin, otherOrigin) = (node.origin, other.origin)
        return origin === otherOrigin || otherOrigin.driver.isSameStorage(as: origin.driver)
    }

    /// - Throws: `unsupported` unless `other` has the same bytes as the child.
    public func requireSameBytes(in other: BlockNode) throws(BlockError) {
        guard !hasSameBytes(in: other) else { return }
        throw BlockError(
            .unsupported,
            "'\(other.name)' does not have the bytes of '\(node.name)', in which its parent has its "
                + "metadata",
            remedy: "put a filter above '\(node.name)' in its place, or a node on the same file",
            node: parentNode?.name)
    }

    /// Has formats write out what they keep in memory of the metadata that they have behind the edge, be it below
    /// others: before another node takes the child's place, while users are held back. What is there is complete
    /// then, whoever reads it afterwards.
    ///
    /// - Throws: where that fails: the child had better stay.
    public func writeOutMetadata() async throws(BlockError) {
        var seen = Set<ObjectIdentifier>()
        var formats: [BlockNode] = []
        var rest = [self]
        while let edge = rest.popLast() {
            guard !edge.roles.contains(.cow), let parent = edge.parentNode, parent.isOpen else {
                continue
            }
            if edge.roles.contains(.metadata), !parent.isReadOnly,
                !formats.contains(where: { $0 === parent })
            {
                formats.append(parent)
            }
            if seen.insert(ObjectIdentifier(parent)).inserted { rest += parent.parents }
        }
        // What an upper one writes out goes through the lower ones.
        for node in formats.sorted(by: { $0.depth < $1.depth }) {
            do throws(BlockError) {
                try await node.stickyFlush()
            } catch {
                throw error.on(node: node.name)
            }
        }
    }

    /// For a driver that has its metadata behind the edge.
    public func refuseOtherBytes() throws(BlockError) {
        throw BlockError(
            .unsupported,
            "the node has its metadata in '\(node.name)', whose bytes would become others",
            remedy: "change what is below it by a filter, or by a node on the same file",
            node: parentNode?.name)
    }

    /// Asks everybody above whether the bytes that come from the child may become others: it is replaced by
    /// a node that does not have the same, or it comes or goes.
    ///
    /// - Throws: what one of the drivers refuses with.
    public func checkOtherBytes() throws(BlockError) {
        var seen = Set<ObjectIdentifier>()
        var rest = [self]
        while let edge = rest.popLast() {
            guard let parent = edge.parentNode, parent.isOpen else { continue }
            try parent.driver.checkOtherBytes(behind: edge)
            if seen.insert(ObjectIdentifier(parent)).inserted { rest += parent.parents }
        }
    }

    /// Users who rely on the size, such as clients that were told it, do not get a child of another.
    ///
    /// - Throws: `permissionDenied`.
    func checkSize(of other: BlockNode) throws(BlockError) {
        guard other.size != node.size else { return }
        switch parent {
        case .user(let user):
            guard !access.shares.contains(.resize), user.reliesOnSize else { return }
        case .node(let parent):
            guard followsSize, parent.isOpen,
                !parent.cumulativeAccess.shares.contains(.resize)
            else { return }
        }
        throw BlockError(
            .permissionDenied,
            "'\(other.name)' has \(other.size) bytes, '\(node.name)' \(node.size), and "
                + "\(parentDescription) does not share resizing",
            remedy: "give both the same size")
    }

    /// The parent's size is the child's, or depends on it.
    private var followsSize: Bool {
        roles.contains(.primary) && !roles.contains(.metadata)
    }

    /// After a replacement: the child has another size, or takes other requests, than the one before.
    func announceReplacement(of old: BlockNode) {
        switch parent {
        case .user(let user): if old.size != node.size { user.nodeResized(self) }
        case .node(let parent):
            guard parent.isOpen else { return }
            if old.limits != node.limits { parent.driver.childLimitsChanged(self) }
            if old.size != node.size { parent.driver.childResized(self) }
        }
    }
}
