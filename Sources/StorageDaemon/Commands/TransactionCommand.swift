import BlockCore
import BlockGraph
import BlockIO
import QMP

extension StorageDaemon {
    /// `transaction`: actions that take effect at one instant, or not at all.
    ///
    /// All nodes, on all threads, are drained from before the first action to after the last, so that for
    /// guests they happen at the same moment; the first that fails has those before it undone, last one
    /// first. Until the requests that are in flight have ended other commands run.
    func transaction(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let actions = try actions(of: arguments)
        try await holdingUsers(of: \.nodes) { drain throws(BlockError) in
            try await carryOutHoldingNodes(actions, drain)
        }
        try await collect()
        return [:]
    }

    private func actions(of arguments: JSONValue) throws(BlockError) -> [JSONValue] {
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
        return actions
    }

    private func carryOutHoldingNodes(
        _ actions: [JSONValue], _ drain: Drain
    ) async throws(BlockError) {
        // What nobody uses after an action stays until the transaction is through: it may be undone.
        try await onEachThread { graph in graph.beginTransaction() }
        let result: Result<Void, BlockError>
        do throws(BlockError) {
            result = .success(try await carryOut(actions, drain))
        } catch {
            result = .failure(error)
        }
        try await onEachThread { graph in graph.endTransaction() }
        try result.get()
    }

    private func carryOut(_ actions: [JSONValue], _ drain: Drain) async throws(BlockError) {
        var done: [Undo] = []
        try await drained(drain) { () throws(BlockError) in
            var failure: BlockError?
            do throws(BlockError) {
                var rest = actions[...]
                while !rest.isEmpty { try await carryOutNext(&rest, &done) }
            } catch {
                failure = await undo(done, after: error)
            }
            try await onEachThread { graph in graph.settleTransaction() }
            if let failure { throw failure }
        }
        // The actions have taken effect: each is finished, whatever becomes of the others.
        var failure: BlockError?
        for action in done {
            do throws(BlockError) { try await action.finish() } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
    }

    /// Undoes actions, last one first: each finds the graph as its action left it.
    ///
    /// - Returns: what the client is told: why, and what could not be undone.
    private func undo(_ done: [Undo], after error: BlockError) async -> BlockError {
        var remains: [String] = []
        for undo in done.reversed() {
            do throws(BlockError) {
                try await undo.step()
            } catch {
                log("transaction: '\(undo.action)' could not be undone: \(error)")
                remains.append("'\(undo.action)' could not be undone: \(error.message)")
            }
        }
        if remains.isEmpty { return error }
        return BlockError(
            error.code, ([error.message] + remains).joined(separator: "; "), remedy: error.remedy,
            node: error.node)
    }

    /// Runs `body` while no request is in flight anywhere, and ends the drain that holds users back.
    private func drained(
        _ drain: Drain, _ body: () async throws(BlockError) -> Void
    ) async throws(BlockError) {
        try await onEachThread { graph in await graph.beginDrain(graph.nodes, as: drain) }
        let result: Result<Void, BlockError>
        do throws(BlockError) {
            result = .success(try await body())
        } catch {
            result = .failure(error)
        }
        try await onEachThread { graph in graph.endDrain(drain) }
        try result.get()
    }

    /// What undoes an action, or finishes it.
    struct Undo {
        typealias Step = () async throws(BlockError) -> Void
        /// As errors name the action.
        var action = ""
        /// Undoes it, while guests are held back.
        var step: Step = { () throws(BlockError) in }
        /// Once nothing will be undone any more: what cannot be.
        var finish: Step = { () throws(BlockError) in }

        /// With its steps carried out where a node is by then.
        func on(_ seat: IOSeat) -> Undo {
            func moved(_ step: @escaping Step) -> Step {
                { () throws(BlockError) in try await seat.visit(step) }
            }
            return Undo(action: action, step: moved(step), finish: moved(finish))
        }
    }

    /// Carries out the next action, or all replacements that stand in a row: their permissions are
    /// worked out together, for users of one node that move to another one after the other conflict.
    ///
    /// - Parameter done: gets what undoes what was done, also where it throws.
    private func carryOutNext(
        _ actions: inout ArraySlice<JSONValue>, _ done: inout [Undo]
    ) async throws(BlockError) {
        var requests: [ReplacementRequest] = []
        while let action = actions.first, action["type"] == "blockdev-replace" {
            actions.removeFirst()
            requests.append(try ReplacementRequest(action["data"] ?? [:], self))
        }
        if requests.isEmpty {
            let action = actions.removeFirst()
            var undo = try await carryOut(action)
            if case .string(let type)? = action["type"] { undo.action = type }
            done.append(undo)
            return
        }
        // Thread by thread. A node that comes from another one may take others along: look again.
        while let first = requests.first {
            let graph = try await graph(of: first)
            var own: [ReplacementRequest] = []
            var others: [ReplacementRequest] = []
            for request in requests {
                let isOwn = try await self.graph(of: request) === graph
                if isOwn { own.append(request) } else { others.append(request) }
            }
            done.append(try await replace(own, in: graph))
            requests = others
        }
    }

    private func replace(
        _ requests: [ReplacementRequest], in graph: BlockGraph
    ) async throws(BlockError) -> Undo {
        try await graph.thread.visit { () throws(BlockError) in
            var replacements: [Replacement] = []
            for request in requests { replacements.append(try await request.resolve(in: graph)) }
            for replacement in replacements { try await replacement.edge.writeOutMetadata() }
            let undo = replacements.map { Replacement(edge: $0.edge, node: $0.edge.node) }
            try Replacement.carryOut(replacements, in: graph)
            return Undo(
                action: "blockdev-replace",
                step: { () throws(BlockError) in
                    for replacement in undo { try await Self.fetch(replacement) }
                    guard let seat = undo.first?.edge.node.seat else { return }
                    try await seat.visit { () throws(BlockError) in
                        try Replacement.carryOut(undo, in: undo[0].edge.node.graph)
                    }
                })
        }
    }

    /// Later actions may have moved what was replaced, or what replaced it.
    private static func fetch(_ replacement: Replacement) async throws(BlockError) {
        try await replacement.edge.node.seat.visit { () throws(BlockError) in
            _ = try await replacement.edge.node.graph.fetchNode(named: replacement.node.name)
        }
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
            let node = try await addNode(data)
            return Undo(step: { () throws(BlockError) in try await node.graph.remove(node) })
                .on(node.seat)
        case "block-export-add":
            let identifier = try OptionReader(data, of: type).required("id")
            _ = try await blockExportAdd(data)
            return Undo(step: { [self] () throws(BlockError) in
                try await takeBack(try requireExport(identifier))
            })
        case "blockdev-snapshot-internal-sync":
            let (node, snapshot) = try await createInternalSnapshot(data)
            return Undo(step: { () throws(BlockError) in
                try await node.graph.deleteSnapshot(snapshot.identifier, of: node)
            }).on(node.seat)
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
