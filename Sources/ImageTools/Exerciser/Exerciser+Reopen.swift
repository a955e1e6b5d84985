import BlockCore
import BlockGraph
import QMP

// Other options for the open image: the graph's own reopening, so that what is refused changes nothing.

extension Exerciser {
    static let reopenCommand = Command(
        name: "reopen", arguments: 0...Int.max, synopsis: "[(-r|-w)] [-c cache] [-o options]",
        summary: "gives the open image other options",
        details:
            " -r read-only, -w writable, -c cache mode, -o node options; others stay as they are"
    ) { exerciser, words throws(BlockError) in
        try await exerciser.reopen(words)
    }

    private func reopen(_ words: [String]) async throws(BlockError) {
        let arguments = try ExerciserArguments(words, known: "c:o:rw", command: "reopen")
        guard arguments.rest.isEmpty else {
            throw ExerciserArguments.misuse("reopen takes options only")
        }
        let mode = try arguments.value("c").map(CacheMode.init(named:))
        let changes = try Self.changes(arguments, mode)
        try checkUse(arguments, changes)
        await settle()
        let present = try reopening(JSONObject())
        let list = try reopening(changes)
        let wasWriting = try image().access.uses.contains(.write)
        // A user that writes keeps a node from becoming read-only.
        if arguments.has("r"), wasWriting { try await use(writing: false) }
        do throws(BlockError) {
            try await session.graph.reopen(list)
        } catch {
            // Why it was refused says more than what comes of that.
            if arguments.has("r"), wasWriting { try? await use(writing: true) }
            throw error
        }
        if changes["read-only"] != nil, !wasWriting, try !image().node.isReadOnly {
            do throws(BlockError) {
                try await use(writing: true)
            } catch {
                try await session.graph.reopen(present)
                throw error
            }
        }
        if let mode { try image().isWriteThrough = mode.isWriteThrough }
    }

    /// What the arguments say of the image's options.
    private static func changes(
        _ arguments: ExerciserArguments, _ mode: CacheMode?
    ) throws(BlockError) -> JSONObject {
        guard !arguments.has("r") || !arguments.has("w") else {
            throw BlockError(.invalidArgument, "-r and -w exclude each other")
        }
        var changes = JSONObject()
        if let text = arguments.value("o") { changes = try ImageSource.nodeOptions(text) }
        if arguments.has("r") || arguments.has("w") {
            guard changes["read-only"] == nil else {
                throw BlockError(
                    .invalidArgument, "-r or -w and the option 'read-only' exclude each other")
            }
            changes["read-only"] = .bool(arguments.has("r"))
        }
        if let mode {
            guard changes["cache"] == nil else {
                throw BlockError(.invalidArgument, "-c and the cache options exclude each other")
            }
            changes["cache"] = [
                "direct": .bool(mode.isDirect), "no-flush": .bool(mode.ignoresFlush),
            ]
        }
        return changes
    }

    /// - Throws: when the image is to be read-only beside what writes to it.
    private func checkUse(
        _ arguments: ExerciserArguments, _ changes: JSONObject
    ) throws(BlockError) {
        let options = try OptionReader(.object(changes), of: "the option list")
        guard try options.bool("read-only") == true,
            try image().access.uses.contains(.write)
        else { return }
        if source.copiesOnRead {
            throw BlockError(
                .invalidArgument, "with -C the image keeps what is read: it cannot be read-only",
                remedy: "close it, and open it without -C")
        }
        guard arguments.has("r") else {
            throw BlockError(
                .permissionDenied, "the image is open to be written: it cannot be read-only",
                remedy: "use -r, which ends that also")
        }
    }

    /// Options for the graph's reopening: those that the image has now, with `changes`.
    private func reopening(_ changes: JSONObject) throws(BlockError) -> [JSONValue] {
        var node = try image().node
        // What stands above the image for -C stays as it is.
        if source.copiesOnRead, let child = node.filteredChild { node = child.node }
        if case .string(let name)? = changes["node-name"], name != node.name {
            throw BlockError(
                .invalidArgument, "a node cannot be named '\(name)' anew", node: node.name)
        }
        guard source.isTemporary, let below = node.backing?.node else {
            return [.object(node.presentOptions.merging(changes))]
        }
        // The temporary image is what is open; its file lost its name, so that it cannot be opened anew.
        // How files are cached is a matter of the image below.
        var own = changes
        var others = JSONObject()
        others["cache"] = own["cache"]
        own["cache"] = nil
        let kept: JSONObject = [
            "file": ["read-only": false, "cache": ["direct": false, "no-flush": true]]
        ]
        let overlay = node.presentOptions.merging(own).merging(kept)
        if others.isEmpty { return [.object(overlay)] }
        return [.object(overlay), .object(below.presentOptions.merging(others))]
    }

    /// Goes on as one who writes to the image, or as one who only reads it.
    private func use(writing: Bool) async throws(BlockError) {
        let old = try image()
        var access = Access.read
        if writing { access.uses.formUnion([.write, .resize]) }
        let new = try session.graph.attach(NamedUser("the exerciser"), to: old.node, access)
        new.isWriteThrough = old.isWriteThrough
        edge = new
        try await session.graph.detach(old)
    }
}

extension JSONObject {
    /// With `changes` in the place of what is there; objects are merged.
    fileprivate func merging(_ changes: JSONObject) -> JSONObject {
        var result = self
        for (key, value) in changes.members {
            if case .object(let new) = value, case .object(let old)? = result[key] {
                result[key] = .object(old.merging(new))
            } else {
                result[key] = value
            }
        }
        return result
    }
}
