import BlockCore
import BlockGraph
import BlockIO
import QMP

/// An `iothread` object: a thread with an engine and a graph of its own, for nodes to move to.
///
/// Of its properties `poll-max-ns` is put into force: how long the engine looks for completions before the
/// thread sleeps. The time doubles while looking pays and goes back to nothing when it does not, which is
/// what `poll-grow` and `poll-shrink` mean by 0; other values of them, `aio-max-batch` (a turn of the loop
/// submits all that came) and `thread-pool-min` and `-max` (all threads share one pool) are kept and told,
/// and change nothing.
final class DaemonThread: Sendable {
    let identifier: String
    let thread: IOThread
    let graph: BlockGraph

    init(_ identifier: String, besides graph: BlockGraph) throws(BlockError) {
        self.identifier = identifier
        // What system tools show has 15 bytes.
        thread = try IOThread(name: "IO \(identifier)")
        self.graph = BlockGraph(on: thread, besides: graph)
    }

    /// Puts a property into force.
    func set(_ name: String, to number: Int) async throws(BlockError) {
        guard name == "poll-max-ns" else { return }
        let thread = thread
        try await thread.visit { () throws(BlockError) in
            thread.setPolling(nanosecondsMax: UInt64(clamping: number))
        }
    }
}

extension StorageDaemon {
    // MARK: Objects

    /// Makes a thread from the properties of `object-add`.
    func makeThread(_ reader: OptionReader) async throws(BlockError) -> DaemonThread {
        let properties = DaemonObject.Kind.thread.properties
        var values: [(name: String, number: Int)] = []
        for property in properties {
            let number = try reader.int(property.name) ?? property.standardNumber
            guard number >= 0 else {
                throw BlockError(
                    .invalidArgument, "\(reader.subject): '\(property.name)' cannot be negative")
            }
            values.append((property.name, number))
        }
        func value(_ name: String) -> Int { values.first { $0.name == name }?.number ?? 0 }
        guard value("thread-pool-min") <= value("thread-pool-max"), value("thread-pool-max") > 0
        else {
            throw BlockError(
                .invalidArgument,
                "\(reader.subject): 'thread-pool-min' must not be above 'thread-pool-max'")
        }
        let identifier = try reader.required("id")
        try reader.finish()
        let made = try DaemonThread(identifier, besides: graph)
        for (name, number) in values { try await made.set(name, to: number) }
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
        thread.thread.retire()
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

extension ObjectProperties.Property {
    fileprivate var standardNumber: Int {
        if case .integer(let number) = standard { return number }
        return 0
    }
}
