import BlockCore
import BlockGraph
import BlockIO
import QMP

/// An `iothread` object: a thread with an engine, a graph and worker threads of its own, for nodes to move to.
final class DaemonThread: Sendable {
    let identifier: String
    let graph: BlockGraph
    let settings: ThreadSettings

    var thread: IOThread { settings.thread }

    init(_ identifier: String, besides graph: BlockGraph) throws(BlockError) {
        self.identifier = identifier
        // What system tools show has 15 bytes.
        let thread = try IOThread(name: "IO \(identifier)")
        settings = ThreadSettings(of: thread)
        self.graph = BlockGraph(on: thread, besides: graph)
    }

    /// Ends the thread, which no node is on, and its workers.
    func retire() {
        settings.letWorkersGo()
        thread.retire()
    }
}

extension StorageDaemon {
    // MARK: Objects

    /// Makes a thread from the properties of `object-add`.
    func makeThread(_ reader: OptionReader) async throws(BlockError) -> DaemonThread {
        let identifier = try reader.required("id")
        let values = try ThreadSettings.read(reader, of: .thread)
        let made = try DaemonThread(identifier, besides: graph)
        do throws(BlockError) {
            try await made.settings.set(values)
        } catch {
            made.retire()
            throw error.doing(reader.subject)
        }
        let graph = made.graph
        try await graph.thread.visit { () throws(BlockError) in watch(graph) }
        return made
    }

    /// Ends a thread that no node is on.
    func end(_ thread: DaemonThread) async throws(BlockError) {
        let graph = thread.graph
        let names = try await graph.thread.visit { () throws(BlockError) in
            (graph.nodes + graph.closing).map(\.name)
        }
        guard names.isEmpty else {
            throw BlockError(
                .busy,
                "iothread '\(thread.identifier)' has nodes: \(names.joined(separator: ", "))",
                remedy: "delete them, or move them with x-blockdev-set-iothread")
        }
        thread.retire()
    }

    /// In the order of their identifiers.
    var ioThreads: [DaemonThread] {
        objects.sorted { $0.key < $1.key }.compactMap {
            if case .thread(let thread) = $0.value { return thread }
            return nil
        }
    }

    func requireThread(_ identifier: String) throws(BlockError) -> DaemonThread {
        guard case .thread(let thread)? = objects[identifier] else {
            throw BlockError(
                .notFound, "there is no iothread '\(identifier)'", remedy: "object-add makes one")
        }
        return thread
    }

    // MARK: Graphs

    /// The main thread's graph, then those of the iothread objects.
    var graphs: [BlockGraph] { [graph] + ioThreads.map(\.graph) }

    /// The graph that has the node, wherever it is.
    func graph(of node: String) throws(BlockError) -> BlockGraph {
        guard let graph = graph.graph(ofNode: node) else {
            throw BlockError(.notFound, "there is no node '\(node)'")
        }
        return graph
    }

    /// Carries out a part of a command on the thread of a node.
    func onThread<T>(
        of name: String, _ body: (BlockNode) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let graph = try graph(of: name)
        return try await graph.thread.visit { () throws(BlockError) in
            try await body(try graph.requireNode(named: name))
        }
    }

    /// Carries out a part of a command on the thread of each graph, one after the other.
    func onEachThread(
        _ body: (BlockGraph) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        for graph in graphs {
            try await graph.thread.visit { () throws(BlockError) in try await body(graph) }
        }
    }

    /// Closes what nobody holds any more, on all threads.
    ///
    /// - Throws: the first failure; all is closed all the same.
    func collect() async throws(BlockError) {
        var failure: BlockError?
        try await onEachThread { graph in
            do throws(BlockError) { try await graph.collect() } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
    }

    /// Where a new node is opened: with the first node that its options refer to; the others move there.
    func home(of options: JSONValue) -> BlockGraph {
        referredGraph(options, nesting: 0) ?? graph
    }

    /// Children first whose data is the node's own.
    private static let childNames = [
        "file", "backing", "data-file", "target", "image", "test", "raw", "log", "header",
    ]

    private func referredGraph(_ options: JSONValue, nesting: Int) -> BlockGraph? {
        guard nesting < Limits.jsonDepthMax else { return nil }
        for name in Self.childNames {
            var found: BlockGraph?
            switch options[name] {
            case .string(let reference)?: found = graph.graph(ofNode: reference)
            case .object(let inner)?: found = referredGraph(.object(inner), nesting: nesting + 1)
            default: break
            }
            if let found { return found }
        }
        return nil
    }

    /// Moves a node, with all that it is joined to, to another graph's thread.
    func move(_ node: String, to other: BlockGraph) async throws(BlockError) {
        try await onThread(of: node) { node throws(BlockError) in
            try await node.graph.move(node, to: other)
        }
    }
}
