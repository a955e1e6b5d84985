import BlockCore
import BlockGraph
import BlockIO
import QMP
import Synchronization

/// An `iothread` object: a thread with an engine, a graph and worker threads of its own, for nodes to move to.
///
/// Its properties are put into force as they are made, and as `qom-set` changes them:
///
///     poll-max-ns        how long the engine looks for completions before the thread sleeps
///     poll-grow          the factor by which that time grows while more of it would pay; 0: 2
///     poll-shrink        what it is divided by when it does not pay; 0: it ends at once
///     aio-max-batch      operations that gather before the system gets them; 0: a turn's
///     thread-pool-min    worker threads that are there although there is nothing to do
///     thread-pool-max    worker threads at most
final class DaemonThread: Sendable {
    let identifier: String
    let thread: IOThread
    let graph: BlockGraph
    let workers: WorkerPool
    private let workerCounts = Mutex(WorkerCounts())

    private struct WorkerCounts {
        var least = 0
        var most = 64
    }

    init(_ identifier: String, besides graph: BlockGraph) throws(BlockError) {
        self.identifier = identifier
        // What system tools show has 15 bytes.
        thread = try IOThread(name: "IO \(identifier)")
        self.graph = BlockGraph(on: thread, besides: graph)
        workers = WorkerPool(threadCountMax: WorkerCounts().most)
    }

    /// Puts properties into force.
    ///
    /// - Throws: `invalidArgument`, with nothing changed, for worker threads that cannot be.
    func set(_ properties: [(name: String, number: Int)]) async throws(BlockError) {
        var counts = workerCounts.withLock { $0 }
        for property in properties {
            switch property.name {
            case "thread-pool-min": counts.least = property.number
            case "thread-pool-max": counts.most = property.number
            default: break
            }
        }
        guard counts.least <= counts.most, counts.most > 0 else {
            throw BlockError(
                .invalidArgument, "'thread-pool-min' must not be above 'thread-pool-max'",
                remedy: "give a maximum of 1 or more, and a minimum up to that")
        }
        workerCounts.withLock { $0 = counts }
        workers.setThreadCounts(least: counts.least, most: counts.most)
        let (thread, workers) = (thread, workers)
        try await thread.visit { () throws(BlockError) in
            thread.workers = workers
            thread.tuning = Self.tuning(thread.tuning, with: properties)
        }
    }

    private static func tuning(
        _ old: EngineTuning, with properties: [(name: String, number: Int)]
    ) -> EngineTuning {
        var tuning = old
        for (name, number) in properties {
            switch name {
            case "poll-max-ns": tuning.pollNanosecondsMax = UInt64(clamping: number)
            case "poll-grow": tuning.pollGrowth = UInt64(clamping: number)
            case "poll-shrink": tuning.pollShrinkage = UInt64(clamping: number)
            case "aio-max-batch": tuning.batchCountMax = number
            default: break
            }
        }
        return tuning
    }

    /// Ends the thread, which no node is on, and its workers.
    func retire() {
        workers.setThreadCounts(least: 0, most: workerCounts.withLock { $0.most })
        thread.retire()
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
        let identifier = try reader.required("id")
        try reader.finish()
        let made = try DaemonThread(identifier, besides: graph)
        let graph = made.graph
        do throws(BlockError) {
            try await made.set(values)
        } catch {
            made.retire()
            throw BlockError(
                error.code, "\(reader.subject): \(error.message)", remedy: error.remedy)
        }
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

extension ObjectProperties.Property {
    fileprivate var standardNumber: Int {
        if case .integer(let number) = standard { return number }
        return 0
    }
}
