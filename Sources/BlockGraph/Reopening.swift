import BlockCore
import QMP

// Changes the options of open nodes: all of them, or none.
//
//     plan       the nodes that are named, and those that were opened with them as their children
//     flush      parents first: a node that goes read-only has nothing left to write
//     prepare    children first: files are opened, tables read; nothing changes yet
//     commit     options, children and permissions at one instant, then every driver
//     finish     files that are not needed any more are closed
//
// All of it while the graph is drained. What throws before the commit leaves everything as it was.

extension BlockGraph {
    /// Gives nodes new options at one instant, as `blockdev-reopen` does; options that are not given
    /// go back to their defaults.
    ///
    /// Children are replaced by naming other nodes; a child that was opened together with its parent
    /// takes new options as an object, and follows its parent in what it does not say itself.
    ///
    /// - Parameter list: options as for opening, complete, each with the `node-name` of an open node.
    /// - Throws: with everything as it was.
    public func reopen(_ list: [JSONValue]) async throws(BlockError) {
        let plan = try await ReopeningPlan(list, of: self)
        let held = plan.steps.map(\.node)
        // A child that is replaced goes when all is done.
        for node in held { node.hold("reopening") }
        let result: Result<Void, BlockError>
        do throws(BlockError) {
            try await drained(nodes) { () throws(BlockError) in try await plan.carryOut() }
            result = .success(())
        } catch {
            result = .failure(error)
        }
        for node in held { node.release("reopening") }
        try await collect()
        try result.get()
    }
}

/// What becomes of each node that takes part in a reopening.
private struct ReopeningPlan {
    private let graph: BlockGraph
    /// Parents before the children that follow them.
    private(set) var steps: [NodeReopening] = []

    init(_ list: [JSONValue], of graph: BlockGraph) async throws(BlockError) {
        self.graph = graph
        for value in list {
            guard case .object(let given) = value, case .string(let name)? = given["node-name"]
            else {
                throw BlockError(
                    .invalidArgument, "option 'node-name' is missing",
                    remedy: "name each node that is to be reopened")
            }
            let node = try graph.requireNode(named: name)
            guard step(for: node) == nil else {
                throw BlockError(.invalidArgument, "it is given twice", node: name)
            }
            guard given["driver"] != nil else {
                throw BlockError(.invalidArgument, "option 'driver' is missing", node: name)
            }
            steps.append(try NodeReopening(node, given, inheriting: NodeOptions()))
        }
        var index = 0
        while index < steps.count {
            try await addChildren(of: steps[index])
            index += 1
        }
        // Each with the parents of it that take part before it.
        steps.sort { $0.node.depth < $1.node.depth }
        for step in steps {
            for other in steps where step.node.children.contains(where: { $0.node === other.node })
            {
                step.childSteps.append(other)
            }
        }
    }

    private func step(for node: BlockNode) -> NodeReopening? {
        steps.first { $0.node === node }
    }

    // MARK: Children

    private mutating func addChildren(of step: NodeReopening) async throws(BlockError) {
        let node = step.node
        for (key, value) in step.given.members where step.isChild(key) {
            // Read here, so that nobody takes it for an unknown option.
            _ = try step.options.value(key)
            try await add(value, as: key, to: step)
        }
        for edge in node.children where step.given[edge.name] == nil {
            guard !edge.roles.contains(.cow) else {
                throw BlockError(
                    .invalidArgument, "option '\(edge.name)' is missing: the node has one",
                    remedy: "give '\(edge.node.name)' to keep it, or null to do without",
                    node: node.name)
            }
            if edge.node.openedFor === edge { try follow(edge, edge.node.presentOptions, step) }
        }
    }

    private mutating func add(
        _ value: JSONValue, as key: String, to step: NodeReopening
    ) async throws(BlockError) {
        let edge = step.node.child(named: key)
        switch (value, edge) {
        case (.null, let edge?):
            guard edge.roles.contains(.cow) else {
                throw BlockError(
                    .invalidArgument, "it cannot do without its '\(key)'", node: step.node.name)
            }
            step.childChanges.append(.detach(edge))
        case (.null, nil): return
        case (.string(let name), let edge?):
            let node = try await graph.fetchNode(named: name)
            if node !== edge.node {
                step.childChanges.append(.replace(edge, node))
            } else if node.openedFor === edge {
                try follow(edge, node.presentOptions, step)
            }
        case (.string(let name), nil):
            step.childChanges.append(
                .attach(try await graph.fetchNode(named: name), name: key, roles: .cow))
        case (.object(let given), let edge?) where edge.node.openedFor === edge:
            try follow(edge, given, step)
        default:
            throw BlockError(
                .invalidArgument,
                "'\(key)' was not opened together with it, so that its options are its own",
                remedy: "give the name of a node, from blockdev-add", node: step.node.name)
        }
    }

    /// A child that was opened together with its parent is reopened with it.
    private mutating func follow(
        _ edge: Edge, _ given: JSONObject, _ parent: NodeReopening
    ) throws(BlockError) {
        if step(for: edge.node) != nil {
            guard case .object? = parent.given[edge.name] else { return }
            throw BlockError(.invalidArgument, "it is given twice", node: edge.node.name)
        }
        steps.append(
            try NodeReopening(
                edge.node, given, inheriting: parent.nodeOptions.inherited(by: edge.roles)))
    }

    // MARK: Steps

    func carryOut() async throws(BlockError) {
        for step in steps where !step.node.isReadOnly {
            do throws(BlockError) {
                try await step.node.stickyFlush()
            } catch {
                throw error.on(node: step.node.name)
            }
        }
        for step in steps {
            for case .replace(let edge, _) in step.childChanges {
                try await edge.writeOutMetadata()
            }
        }
        var prepared: [DriverReopening] = []
        do throws(BlockError) {
            for step in steps.reversed() { prepared.append(try await prepare(step)) }
            try change()
        } catch {
            for reopening in prepared.reversed() { await reopening.abort() }
            throw error
        }
        for (step, reopening) in zip(steps.reversed(), prepared) {
            if let driver = reopening.driver { step.node.setDriver(driver) }
            reopening.commit()
            step.node.openedWith = step.given
        }
        for reopening in prepared { await reopening.finish() }
    }

    private func prepare(_ step: NodeReopening) async throws(BlockError) -> DriverReopening {
        do throws(BlockError) {
            let reopening = try await step.node.driver.prepareReopening(step)
            do throws(BlockError) {
                try step.options.finish()
            } catch {
                await reopening.abort()
                throw error
            }
            return reopening
        } catch {
            throw error.on(node: step.node.name)
        }
    }

    /// The graph's part: options, children, permissions.
    private func change() throws(BlockError) {
        let transaction = GraphTransaction(graph)
        do throws(BlockError) {
            for step in steps {
                transaction.setOptions(step.nodeOptions, of: step.node)
                for change in step.childChanges {
                    switch change {
                    case .attach(let child, let name, let roles):
                        let edge = try transaction.attach(
                            child, to: .node(step.node), as: name, roles: roles)
                        try edge.checkOtherBytes()
                    case .replace(let edge, let child): try transaction.replace(edge, with: child)
                    case .detach(let edge):
                        try edge.checkOtherBytes()
                        transaction.detach(edge)
                    }
                }
            }
            try transaction.commit()
        } catch {
            transaction.abort()
            throw error
        }
    }
}
