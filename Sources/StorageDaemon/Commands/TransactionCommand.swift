import BlockCore
import BlockGraph
import QMP

extension StorageDaemon {
    /// `transaction`: actions that take effect at one instant, or not at all.
    ///
    /// All nodes are drained from before the first action to after the last, so that for guests they
    /// happen at the same moment; the first that fails has those before it undone, last one first.
    func transaction(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "transaction")
        guard let actions = try reader.list("actions") else {
            throw BlockError(.invalidArgument, "transaction: parameter 'actions' is missing")
        }
        if let properties = try reader.object("properties") {
            let mode = try properties.string("completion-mode") ?? "individual"
            try properties.finish()
            guard mode == "individual" else {
                throw BlockError(
                    .unsupported, "completion-mode '\(mode)' is for actions that start jobs",
                    remedy: "use individual")
            }
        }
        try reader.finish()
        try await graph.drained(graph.nodes) { () throws(BlockError) in
            var undo: [() async throws(BlockError) -> Void] = []
            for action in actions {
                do throws(BlockError) {
                    undo.append(try await carryOut(action))
                } catch {
                    for step in undo.reversed() { try? await step() }
                    throw error
                }
            }
        }
        try await graph.collect()
        return [:]
    }

    /// - Returns: what undoes the action.
    private func carryOut(
        _ action: JSONValue
    ) async throws(BlockError) -> () async throws(BlockError) -> Void {
        let reader = try OptionReader(action, of: "transaction action")
        let type = try reader.required("type")
        let data = try reader.value("data") ?? [:]
        try reader.finish()
        switch type {
        case "blockdev-add":
            let node = try await graph.open(data, monitorOwned: true)
            return { [graph] () throws(BlockError) in try await graph.remove(node) }
        case "blockdev-replace":
            let replacement = try replacement(data)
            let old = replacement.edge.node
            // What nobody uses afterwards stays until the transaction is through.
            old.hold("transaction")
            defer { old.release("transaction") }
            try replacement.carryOut(in: graph)
            return { [graph] () throws(BlockError) in
                try Replacement(edge: replacement.edge, node: old).carryOut(in: graph)
            }
        case "block-export-add":
            let identifier = try OptionReader(data, of: type).required("id")
            _ = try await blockExportAdd(data)
            return { [self] () throws(BlockError) in
                _ = try await blockExportDel(["id": .string(identifier), "mode": "hard"])
            }
        case "abort":
            throw BlockError(.cancelled, "the transaction was aborted by its 'abort' action")
        default:
            throw BlockError(
                .unsupported, "there is no transaction action '\(type)'",
                remedy: "use blockdev-add, blockdev-replace, block-export-add or abort")
        }
    }
}
