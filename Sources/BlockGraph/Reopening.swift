import BlockCore
import QMP

/// Changes the options of open nodes: all of them, or none.
extension BlockGraph {
    /// The options of every node that requests look at, and that so may change while it is open.
    private static let changeable: Set<String> = [
        "node-name", "driver", "read-only", "auto-read-only", "force-share", "discard",
        "detect-zeroes", "cache",
    ]

    /// What becomes of one node.
    private struct Reopening {
        let node: BlockNode
        let given: JSONObject
        let options: NodeOptions
        let replacements: [(edge: Edge, node: BlockNode)]
    }

    /// Gives nodes new options at one instant, as `blockdev-reopen` does; options that are not given
    /// go back to their defaults.
    ///
    /// Children may be replaced by other nodes; of the options of every node, those may change that
    /// need no file to be opened again; a driver's own have to stay.
    ///
    /// - Parameter list: options as for opening, complete, each with the `node-name` of an open node.
    /// - Throws: with everything as it was.
    public func reopen(_ list: [JSONValue]) async throws(BlockError) {
        var changes: [Reopening] = []
        for options in list {
            let change = try reopening(options)
            guard !changes.contains(where: { $0.node === change.node }) else {
                throw BlockError(
                    .invalidArgument, "it is given twice", node: change.node.name)
            }
            changes.append(change)
        }
        try await drained(nodes) { () throws(BlockError) in
            let transaction = GraphTransaction(self)
            do throws(BlockError) {
                for change in changes {
                    transaction.setOptions(change.options, of: change.node)
                    for (edge, node) in change.replacements {
                        try transaction.replace(edge, with: node)
                    }
                }
                try transaction.commit()
            } catch {
                transaction.abort()
                throw error
            }
            for change in changes { change.node.openedWith = change.given }
        }
        try await collect()
    }

    private func reopening(_ value: JSONValue) throws(BlockError) -> Reopening {
        let reader = try OptionReader(value, of: "the node")
        guard case .object(let given) = value, let name = try reader.string("node-name") else {
            throw BlockError(.invalidArgument, "option 'node-name' is missing")
        }
        let node = try requireNode(named: name)
        reader.subject = "node '\(name)' (driver '\(node.description.name)')"
        guard node.isReady else { throw BlockError(.busy, "it is being opened", node: name) }
        guard try reader.string("driver") == node.description.name else {
            throw BlockError(
                .invalidArgument, "its driver is '\(node.description.name)' and stays so",
                node: name)
        }
        var options = try NodeOptions(reading: reader, inheriting: NodeOptions())
        let old = node.options
        // A file that could only be opened for reading stays what it is.
        if options.autoReadOnly, old.isReadOnly { options.isReadOnly = true }
        let needsFile =
            options.isDirect != old.isDirect || options.sharesAll != old.sharesAll
            || (options.isReadOnly != old.isReadOnly && node.description.kind == .storage)
            // Above the storage it has been handed down to the children.
            || (options.ignoresFlush != old.ignoresFlush && node.description.kind != .storage)
        guard !needsFile else {
            throw BlockError(
                .unsupported,
                "read-only, cache and force-share cannot change so while it is open",
                node: name)
        }
        return Reopening(
            node: node, given: given, options: options,
            replacements: try replacements(of: node, given))
    }

    /// - Throws: for an own option of the driver that would change.
    private func replacements(
        of node: BlockNode, _ given: JSONObject
    ) throws(BlockError) -> [(edge: Edge, node: BlockNode)] {
        var result: [(edge: Edge, node: BlockNode)] = []
        for (key, value) in given.members where !Self.changeable.contains(key) {
            if case .string(let reference) = value, let edge = node.child(named: key) {
                result.append((edge, try requireNode(named: reference)))
            } else if value != node.openedWith[key] {
                throw BlockError(
                    .unsupported, "option '\(key)' cannot change while it is open",
                    node: node.name)
            }
        }
        for (key, _) in node.openedWith.members
        where !Self.changeable.contains(key) && given[key] == nil {
            throw BlockError(
                .invalidArgument, "option '\(key)' was given when it was opened",
                remedy: "give it again", node: node.name)
        }
        return result
    }
}
