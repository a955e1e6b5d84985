import BlockCore
import BlockExports
import BlockGraph
import QMP

extension StorageDaemon {
    /// `blockdev-add`: opens a node, which the monitor then holds.
    func blockdevAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        _ = try await graph.open(arguments, monitorOwned: true)
        return [:]
    }

    /// `blockdev-del`: drops the monitor's hold of a node that nobody uses.
    func blockdevDel(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-del")
        let node = try graph.requireNode(named: try reader.required("node-name"))
        try reader.finish()
        try await graph.remove(node)
        return [:]
    }

    /// `blockdev-reopen`: new options for open nodes, all at one instant or none.
    func blockdevReopen(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-reopen")
        let options = try reader.list("options") ?? []
        try reader.finish()
        try await graph.reopen(options)
        return [:]
    }

    /// `blockdev-replace`: puts a node in the place of a child of a node, or below an export.
    func blockdevReplace(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let replacement = try replacement(arguments)
        try await graph.drained([replacement.edge.node, replacement.node]) {
            () throws(BlockError) in
            try Replacement.carryOut([replacement], in: graph)
        }
        try await graph.collect()
        return [:]
    }

    /// An edge and the node to come behind it.
    struct Replacement {
        let edge: Edge
        let node: BlockNode

        /// Puts all nodes in their places, or none.
        ///
        /// - Throws: with the graph as it was.
        static func carryOut(
            _ replacements: [Replacement], in graph: BlockGraph
        ) throws(BlockError) {
            let transaction = GraphTransaction(graph)
            do throws(BlockError) {
                for replacement in replacements {
                    try transaction.replace(replacement.edge, with: replacement.node)
                }
                try transaction.commit()
            } catch {
                transaction.abort()
                throw error
            }
        }
    }

    func replacement(_ arguments: JSONValue) throws(BlockError) -> Replacement {
        let reader = try OptionReader(arguments, of: "blockdev-replace")
        let type = try reader.required("parent-type")
        let node = try graph.requireNode(named: try reader.required("new-child"))
        let edge: Edge
        switch type {
        case "export":
            let record = try requireExport(try reader.required("export-id"))
            guard let used = record.export.edge else {
                throw BlockError(.busy, "export '\(record.identifier)' is going away")
            }
            edge = used
        case "driver":
            let parent = try graph.requireNode(named: try reader.required("node-name"))
            let name = try reader.required("child")
            guard let child = parent.child(named: name) else {
                throw BlockError(
                    .notFound, "it has no child '\(name)'", node: parent.name)
            }
            edge = child
        case "qdev":
            throw BlockError(
                .unsupported, "there are no guest devices here", remedy: "use parent-type=export")
        default:
            throw BlockError(
                .invalidArgument, "parameter 'parent-type' does not accept '\(type)'",
                remedy: "use export or driver")
        }
        try reader.finish()
        return Replacement(edge: edge, node: node)
    }

    /// `block_resize`.
    func blockResize(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "block_resize")
        let device = try reader.string("device")
        let nodeName = try reader.string("node-name")
        guard let size = try reader.int("size") else {
            throw BlockError(.invalidArgument, "block_resize: parameter 'size' is missing")
        }
        try reader.finish()
        guard (device == nil) != (nodeName == nil), let name = nodeName ?? device else {
            throw BlockError(.invalidArgument, "give either 'device' or 'node-name'")
        }
        guard size >= 0 else {
            throw BlockError(.invalidArgument, "a size cannot be negative: \(size)")
        }
        let node = try graph.requireNode(named: name)
        let edge = try graph.attach(
            NamedUser("block_resize"), to: node, Access(uses: .resize, shares: .all))
        do throws(BlockError) {
            try await edge.resize(to: size)
        } catch {
            try? await graph.detach(edge)
            throw error
        }
        try await graph.detach(edge)
        return [:]
    }
}
