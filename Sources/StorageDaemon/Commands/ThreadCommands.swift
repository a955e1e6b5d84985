import BlockCore
import BlockGraph
import QMP

// The threads that nodes run on.

extension StorageDaemon {
    /// `query-iothreads`.
    func queryThreads(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        var result: [JSONValue] = []
        for thread in ioThreads {
            var entry: JSONObject = [
                "id": .string(thread.identifier),
                "thread-id": .integer(thread.thread.systemIdentifier),
            ]
            for name in ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"] {
                entry[name] = objectProperties[thread.identifier]?[name]
            }
            result.append(.object(entry))
        }
        return .array(result)
    }

    /// `x-blockdev-set-iothread`: moves a node, and all that it is joined to; null for the main thread.
    func setThread(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "x-blockdev-set-iothread")
        let name = try reader.required("node-name")
        let identifier: String?
        switch try reader.value("iothread") {
        case .string(let text)?: identifier = text
        case .null?: identifier = nil
        default:
            throw BlockError(
                .invalidArgument,
                "x-blockdev-set-iothread: 'iothread' must be an iothread's identifier, or null")
        }
        let isForced = try reader.bool("force") ?? false
        try reader.finish()
        if !isForced { try await checkUnused(name) }
        let component: (BlockGraph) -> [BlockNode] = { graph in
            graph.node(named: name)?.component ?? []
        }
        try await holdingUsers(of: component) { _ throws(BlockError) in
            // Users may have come while it waited.
            if !isForced { try await checkUnused(name) }
            let destination = try identifier.map { text throws(BlockError) in
                try requireThread(text).graph
            }
            try await move(name, to: destination ?? graph)
        }
        return [:]
    }

    private func checkUnused(_ name: String) async throws(BlockError) {
        let users = try await onThread(of: name) { node in
            node.parents.filter { $0.parentNode == nil }.map(\.parentDescription)
        }
        guard users.isEmpty else {
            throw BlockError(
                .busy, "the node is in use by \(users.joined(separator: ", "))",
                remedy: "use force=true: they move along, where they can", node: name)
        }
    }

    // MARK: Table

    static let threadCommands = [
        DaemonCommand(
            CommandSchema("query-iothreads", result: .array(.named("IOThreadInfo"))),
            StorageDaemon.queryThreads),
        DaemonCommand(
            CommandSchema(
                "x-blockdev-set-iothread", .required("node-name", .string),
                .required("iothread", .named("StrOrNull")), .optional("force", .boolean),
                features: ["unstable"]), StorageDaemon.setThread),
    ]

    static let threadDefinitions: [String: SchemaDefinition] = [
        "IOThreadInfo": .object(
            ObjectSchema([
                .required("id", .string), .required("thread-id", .integer),
                .required("poll-max-ns", .integer), .required("poll-grow", .integer),
                .required("poll-shrink", .integer), .required("aio-max-batch", .integer),
            ])),
        "StrOrNull": .alternate([.string, .null]),
    ]
}
