import BlockCore
import BlockGraph
import QMP

extension StorageDaemon {
    /// `transaction`: actions that take effect at one instant, or not at all.
    ///
    /// All nodes are drained from before the first action to after the last, so that for guests they
    /// happen at the same moment; the first that fails has those before it undone, last one first.
    func transaction(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let result = try await transactionHoldingNodes(arguments)
        try await graph.collect()
        return result
    }

    private func transactionHoldingNodes(
        _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
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
        // What nobody uses after an action stays until the transaction is through: it may be undone.
        let held = graph.nodes
        for node in held { node.hold("transaction") }
        defer { for node in held { node.release("transaction") } }
        var cleanUp: [Undo.Step] = []
        var done: [Undo] = []
        do throws(BlockError) {
            try await graph.drained(graph.nodes) { () throws(BlockError) in
                var rest = actions[...]
                while !rest.isEmpty {
                    do throws(BlockError) {
                        done.append(try await carryOutNext(&rest))
                    } catch {
                        for undo in done.reversed() {
                            try? await undo.atOnce()
                            cleanUp.append(undo.afterwards)
                        }
                        throw error
                    }
                }
            }
        } catch {
            for step in cleanUp { try? await step() }
            throw error
        }
        // The actions have taken effect: each is finished, whatever becomes of the others.
        var failure: BlockError?
        for action in done {
            do throws(BlockError) { try await action.finish() } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
        return [:]
    }

    /// What undoes an action, or finishes it.
    struct Undo {
        typealias Step = () async throws(BlockError) -> Void
        /// While guests are still held back: what they would notice.
        var atOnce: Step = { () throws(BlockError) in }
        /// When they go on again: an export's clients may wait for requests that are held back.
        var afterwards: Step = { () throws(BlockError) in }
        /// Once nothing will be undone any more: what cannot be.
        var finish: Step = { () throws(BlockError) in }
    }

    /// Carries out the next action, or all replacements that stand in a row: their permissions are
    /// worked out together, for users of one node that move to another one after the other conflict.
    private func carryOutNext(_ actions: inout ArraySlice<JSONValue>) async throws(BlockError)
        -> Undo
    {
        var replacements: [Replacement] = []
        while let action = actions.first, action["type"] == "blockdev-replace" {
            actions.removeFirst()
            replacements.append(try replacement(action["data"] ?? [:]))
        }
        guard replacements.isEmpty else {
            let undo = replacements.map { Replacement(edge: $0.edge, node: $0.edge.node) }
            try Replacement.carryOut(replacements, in: graph)
            return Undo(atOnce: { [graph] () throws(BlockError) in
                try Replacement.carryOut(undo, in: graph)
            })
        }
        return try await carryOut(actions.removeFirst())
    }

    /// - Returns: what undoes the action.
    private func carryOut(
        _ action: JSONValue
    ) async throws(BlockError) -> Undo {
        let reader = try OptionReader(action, of: "transaction action")
        let type = try reader.required("type")
        let data = try reader.value("data") ?? [:]
        try reader.finish()
        switch type {
        case "blockdev-add":
            let node = try await graph.open(data, monitorOwned: true)
            return Undo(afterwards: { [graph] () throws(BlockError) in try await graph.remove(node)
            })
        case "block-export-add":
            let identifier = try OptionReader(data, of: type).required("id")
            _ = try await blockExportAdd(data)
            return Undo(afterwards: { [self] () throws(BlockError) in
                _ = try await blockExportDel(["id": .string(identifier), "mode": "hard"])
            })
        case "blockdev-snapshot-internal-sync":
            let (node, snapshot) = try await createInternalSnapshot(data)
            return Undo(atOnce: { [graph] () throws(BlockError) in
                try await graph.deleteSnapshot(snapshot.identifier, of: node)
            })
        case "abort":
            throw BlockError(.cancelled, "the transaction was aborted by its 'abort' action")
        default:
            if let change = BitmapAction(rawValue: type) {
                return try await carryOut(change, data)
            }
            throw BlockError(
                .unsupported, "there is no transaction action '\(type)'",
                remedy: "query-qmp-schema lists them as TransactionActionKind")
        }
    }
}
