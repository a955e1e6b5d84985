import BlockCore
import BlockExports
import BlockGraph
import QMP

extension StorageDaemon {
    /// `blockdev-add`: opens a node, which the monitor then holds. Nodes of other threads that become its children
    /// move there; until the requests to them that are in flight have ended other commands run.
    func blockdevAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let home = home(of: arguments)
        let named = Self.texts(in: [arguments])
        let concerned: (BlockGraph) -> [BlockNode] = { other in
            other === home
                ? [] : named.compactMap { other.node(named: $0) }.flatMap(\.component)
        }
        try await holdingUsers(of: concerned) { _ throws(BlockError) in
            _ = try await addNode(arguments)
        }
        return [:]
    }

    /// Opens a node on the thread of those that its options refer to.
    func addNode(_ options: JSONValue) async throws(BlockError) -> BlockNode {
        let home = home(of: options)
        return try await home.thread.visit { () throws(BlockError) in
            try await home.open(options, monitorOwned: true)
        }
    }

    /// `blockdev-del`: drops the monitor's hold of a node that nobody uses.
    func blockdevDel(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-del")
        let name = try reader.required("node-name")
        try reader.finish()
        let (graph, removal) = try await onThread(of: name) { node throws(BlockError) in
            (node.graph, try node.graph.beginRemoval(of: node))
        }
        try await end("removing node '\(name)'") { () throws(BlockError) in
            try await graph.thread.visit { () throws(BlockError) in
                try await graph.finish(removal)
            }
        }
        return [:]
    }

    /// `blockdev-reopen`: new options for open nodes, all at one instant or none. They are on one thread;
    /// nodes that become their children move there. Until the requests that are in flight have ended other
    /// commands run.
    func blockdevReopen(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-reopen")
        let options = try reader.list("options") ?? []
        try reader.finish()
        var first: String?
        if case .string(let name)? = options.first?["node-name"] { first = name }
        if let first { _ = try graph(of: first) }
        let named = Self.texts(in: options)
        let concerned: (BlockGraph) -> [BlockNode] = { [graph] other in
            let isHome = first.map { other.node(named: $0) != nil } ?? (other === graph)
            return isHome
                ? other.nodes : named.compactMap { other.node(named: $0) }.flatMap(\.component)
        }
        try await holdingUsers(of: concerned) { _ throws(BlockError) in
            // Other commands may have moved it meanwhile.
            let home = try first.map { name throws(BlockError) in try graph(of: name) } ?? graph
            try await home.thread.visit { () throws(BlockError) in
                try await home.reopen(options)
            }
        }
        return [:]
    }

    /// All texts in options: among them the names of nodes that become children.
    private static func texts(in options: [JSONValue]) -> Set<String> {
        var result: Set<String> = []
        var rest = options
        while let value = rest.popLast() {
            switch value {
            case .string(let text): result.insert(text)
            case .array(let values): rest += values
            case .object(let object): rest += object.members.map(\.value)
            default: break
            }
        }
        return result
    }

    /// `blockdev-replace`: puts a node in the place of a child of a node, or below an export. Until the requests
    /// that are in flight have ended other commands run.
    func blockdevReplace(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let request = try ReplacementRequest(arguments, self)
        try await holdingUsers(of: request.concerned) { _ throws(BlockError) in
            let graph = try await graph(of: request)
            try await graph.thread.visit { () throws(BlockError) in
                let replacement = try await request.resolve(in: graph)
                try await graph.drained([replacement.edge.node, replacement.node]) {
                    () throws(BlockError) in
                    try await replacement.edge.writeOutMetadata()
                    try Replacement.carryOut([replacement], in: graph)
                }
                try await graph.collect()
            }
        }
        return [:]
    }

    /// What a replacement asks for, before the nodes are looked up.
    struct ReplacementRequest {
        enum Place {
            case export(ExportRecord)
            case child(of: String, named: String)
        }

        let place: Place
        let node: String

        init(_ arguments: JSONValue, _ daemon: StorageDaemon) throws(BlockError) {
            let reader = try OptionReader(arguments, of: "blockdev-replace")
            let type = try reader.required("parent-type")
            node = try reader.required("new-child")
            switch type {
            case "export":
                place = .export(try daemon.requireExport(try reader.required("export-id")))
            case "driver":
                place = .child(
                    of: try reader.required("node-name"), named: try reader.required("child"))
            case "qdev":
                throw BlockError(
                    .unsupported, "there are no guest devices here",
                    remedy: "use parent-type=export")
            default:
                throw BlockError(
                    .invalidArgument, "parameter 'parent-type' does not accept '\(type)'",
                    remedy: "use export or driver")
            }
            try reader.finish()
        }

        /// The nodes of a graph whose users are held back, on its thread.
        func concerned(in graph: BlockGraph) -> [BlockNode] {
            var result: [BlockNode] = []
            switch place {
            case .export(let record):
                let export = record.export
                if export.seat.isCurrent, let edge = export.edge { result.append(edge.node) }
            case .child(let parentName, let name):
                if let edge = graph.node(named: parentName)?.child(named: name) {
                    result.append(edge.node)
                }
            }
            guard let child = graph.node(named: node) else { return result }
            // From another thread it comes with all that it is joined to.
            return result.isEmpty ? child.component : result + [child]
        }

        /// On the graph's thread; a new child that is elsewhere moves here.
        func resolve(in graph: BlockGraph) async throws(BlockError) -> Replacement {
            let child = try await graph.fetchNode(named: node)
            switch place {
            case .export(let record):
                guard let edge = record.export.edge else {
                    throw BlockError(.busy, "export '\(record.identifier)' is going away")
                }
                return Replacement(edge: edge, node: child)
            case .child(let parentName, let name):
                let parent = try graph.requireNode(named: parentName)
                guard let edge = parent.child(named: name) else {
                    throw BlockError(.notFound, "it has no child '\(name)'", node: parent.name)
                }
                return Replacement(edge: edge, node: child)
            }
        }
    }

    /// Where a replacement takes place.
    func graph(of request: ReplacementRequest) async throws(BlockError) -> BlockGraph {
        switch request.place {
        case .export(let record):
            let export = record.export
            // An export that is gone may have been on a thread that is gone too.
            let isThere = exports.contains { $0 === record } && !record.isClosing
            let found =
                isThere
                ? try await export.seat.visit { () throws(BlockError) in export.edge?.node.graph }
                : nil
            guard let found else {
                throw BlockError(.busy, "export '\(record.identifier)' is going away")
            }
            return found
        case .child(let parent, _): return try graph(of: parent)
        }
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

    /// `block_resize`: beside other commands, for it waits for writes that are in flight, and for storage.
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
        let edge = try await onThread(of: name) { node throws(BlockError) in
            try node.graph.attach(
                NamedUser("block_resize"), to: node, Access(uses: .resize, shares: .all))
        }
        // The user keeps the node, and keeps it on its thread.
        try await aside { () throws(BlockError) in
            try await edge.node.seat.visit { () throws(BlockError) in
                let graph = edge.node.graph
                do throws(BlockError) {
                    try await edge.resize(to: size)
                } catch {
                    try? await graph.detach(edge)
                    throw error
                }
                try await graph.detach(edge)
            }
        }
        return [:]
    }
}
