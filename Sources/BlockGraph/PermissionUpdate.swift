import BlockCore

/// Works out who may do what in the part of the graph below some nodes, and puts it into force.
struct PermissionUpdate {
    /// Parents before children.
    private let order: [BlockNode]
    private var cumulative: [ObjectIdentifier: Access] = [:]
    private var edges: [(edge: Edge, access: Access)] = []
    /// Which of `edges` are of the users of each node in `order`.
    private var users: [Range<Int>] = []

    init(around touched: [BlockNode]) {
        order = Self.topological(touched)
        let affected = Set(order.map(ObjectIdentifier.init))
        for node in order {
            var total = Access.none
            let first = edges.count
            for edge in node.parents {
                let access = Self.access(of: edge, affected, cumulative)
                edges.append((edge, access))
                total.uses.formUnion(access.uses)
                total.shares.formIntersection(access.shares)
            }
            users.append(first..<edges.count)
            cumulative[ObjectIdentifier(node)] = total
        }
    }

    private static func access(
        of edge: Edge, _ affected: Set<ObjectIdentifier>,
        _ cumulative: [ObjectIdentifier: Access]
    ) -> Access {
        guard let parent = edge.parentNode else { return edge.requestedAccess }
        // A parent that is not affected goes on as it was; a new edge of it has no access yet.
        let users = cumulative[ObjectIdentifier(parent)] ?? parent.cumulativeAccess
        var access =
            parent.isOpen
            ? parent.driver.access(to: edge, for: users)
            : DefaultAccess.access(
                roles: edge.roles, isWritable: !parent.isReadOnly, for: users)
        if parent.options.sharesAll { access.shares = .all }
        return access
    }

    /// - Throws: when two users of a node conflict, or a driver refuses.
    func check() throws(BlockError) {
        for (index, node) in order.enumerated() {
            do throws(BlockError) {
                try checkUsers(of: node, edges[users[index]])
                if node.isOpen, let access = cumulative[ObjectIdentifier(node)] {
                    try node.driver.checkAccess(access)
                }
            } catch {
                for checked in order[..<index] where checked.isOpen {
                    checked.driver.abortAccess()
                }
                if node.isOpen { node.driver.abortAccess() }
                throw error
            }
        }
    }

    private func checkUsers(
        of node: BlockNode, _ own: ArraySlice<(edge: Edge, access: Access)>
    ) throws(BlockError) {
        for (edge, access) in own {
            if node.isReadOnly, !access.uses.isDisjoint(with: [.write, .resize]) {
                throw BlockError(
                    .readOnly, "\(edge.parentDescription) wants to write it, but it is read-only",
                    remedy: "open it with read-only=off", node: node.name)
            }
            for (other, otherAccess) in own where other !== edge {
                let refused = access.uses.subtracting(otherAccess.shares)
                guard refused.isEmpty else {
                    throw BlockError(
                        .permissionDenied,
                        "\(edge.parentDescription) needs "
                            + "\(refused.names.joined(separator: ", ")), which "
                            + "\(other.parentDescription) does not share",
                        node: node.name)
                }
            }
        }
    }

    func apply() {
        for (edge, access) in edges { edge.access = access }
        for node in order {
            guard let access = cumulative[ObjectIdentifier(node)] else { continue }
            node.cumulativeAccess = access
            node.deriveTimeLimit()
            if node.isOpen { node.driver.applyAccess(access) }
        }
    }

    /// All nodes at or below `roots`, parents before children; without recursion.
    static func topological(_ roots: [BlockNode]) -> [BlockNode] {
        var finished: [BlockNode] = []
        var state: [ObjectIdentifier: Bool] = [:]
        var stack = roots.map { ($0, false) }
        while let (node, isLeaving) = stack.popLast() {
            let identity = ObjectIdentifier(node)
            if isLeaving {
                if state[identity] == false {
                    state[identity] = true
                    finished.append(node)
                }
                continue
            }
            guard state[identity] == nil else { continue }
            state[identity] = false
            stack.append((node, true))
            for edge in node.children { stack.append((edge.node, false)) }
        }
        return finished.reversed()
    }
}
