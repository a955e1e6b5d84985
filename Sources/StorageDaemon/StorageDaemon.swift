import BlockCore
import BlockExports
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import QMP

/// What the daemon holds: the graphs, the NBD server, exports, objects, jobs. Confined to its main thread.
///
///     main thread:     clients · commands · server · tables        graph (nodes that are nowhere else)
///     iothread a:                                                  graph
///     iothread b:                                                  graph
///
/// Each QMP command is a method in `Commands/`, from arguments as JSON to a result as JSON; how
/// commands arrive is none of their business. A command begins and ends on the main thread; where it touches
/// nodes it visits their thread (`onThread(of:)`): there it leaves the daemon's own tables alone.
public final class StorageDaemon: @unchecked Sendable {
    public let thread: IOThread
    /// The main thread's.
    public let graph: BlockGraph
    var nbdServer: NBDServer?
    /// The identifier of the credentials with which the server was started, if its clients need TLS.
    var nbdServerCredentials: String?
    private var tables = Tables()
    /// In the order they were added.
    var exports: [ExportRecord] {
        get { onMainThread(\.exports) }
        set { onMainThread(\.exports, set: newValue) }
    }
    var jobs: [ImageJob] {
        get { onMainThread(\.jobs) }
        set { onMainThread(\.jobs, set: newValue) }
    }
    /// Secrets, credentials, threads and the like, by identifier.
    var objects: [String: DaemonObject] {
        get { onMainThread(\.objects) }
        set { onMainThread(\.objects, set: newValue) }
    }
    /// What they were made with.
    var objectProperties: [String: ObjectProperties] = [:]
    /// By identifier.
    var characterDevices: [String: any CharacterDevice] = [:]
    /// Open files that a service manager handed over, by name.
    var inheritedDescriptors: [String: Int32] = [:]
    /// Of the client whose command is being run.
    var callerDescriptors: PassedDescriptors?
    /// Commands wait here for those before them.
    let turns = Turns()
    /// Called with each event: its name, and its data.
    public var emit: (String, JSONValue) -> Void = { _, _ in }
    /// Called with what went wrong where no client is told, a line each.
    public var log: (String) -> Void = { _ in }
    /// What goes on although the command that began it has been replied to; see `Ending.swift`.
    var endings: [Ending] = []
    /// By commands that wait for their requests, or go on; see `HeldUsers.swift`.
    var heldUsers: [HeldUsers] = []
    /// Parts of commands beside which others run.
    var asideCount = 0
    let asideEnded = WakeUp()
    /// Commands that have not begun do not begin any more.
    private(set) var isClosing = false
    /// Called when a client asks the daemon to end.
    public var quit: () -> Void = {}

    private struct Tables {
        var exports: [ExportRecord] = []
        var jobs: [ImageJob] = []
        var objects: [String: DaemonObject] = [:]
    }

    private func onMainThread<T>(_ table: KeyPath<Tables, T>) -> T {
        thread.preconditionOnThread()
        return tables[keyPath: table]
    }

    private func onMainThread<T>(_ table: WritableKeyPath<Tables, T>, set value: T) {
        thread.preconditionOnThread()
        tables[keyPath: table] = value
    }

    /// An export and the identifier that commands know it by. Confined to the main thread.
    final class ExportRecord: @unchecked Sendable {
        let identifier: String
        let export: NBDExport
        /// The node it was added with, for queries while it closes.
        let nodeName: String
        /// It goes, as soon as its requests have ended.
        var isClosing = false

        init(_ identifier: String, _ export: NBDExport, of nodeName: String) {
            self.identifier = identifier
            self.export = export
            self.nodeName = nodeName
        }
    }

    public static let registry = DriverRegistry(
        BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)

    public init(on thread: IOThread) {
        self.thread = thread
        graph = BlockGraph(on: thread, registry: Self.registry)
        watch(graph)
    }

    /// Has events told of what happens in a graph. On its thread.
    func watch(_ graph: BlockGraph) {
        graph.corruptionObserver = { [weak self] node, corruption in
            self?.post("BLOCK_IMAGE_CORRUPTED", Self.eventData(node, corruption))
        }
    }

    /// Emits an event, from any thread; those of one thread in their order.
    func post(_ name: String, _ data: JSONValue) {
        thread.spawn { [self] in emit(name, data) }
    }

    private static func eventData(_ node: BlockNode, _ corruption: ImageCorruption) -> JSONValue {
        var data: JSONObject = ["device": ""]
        if !node.name.hasPrefix("#") { data["node-name"] = .string(node.name) }
        data["msg"] = .string(corruption.message)
        if let place = corruption.place {
            data["offset"] = .integer(place.offset)
            data["size"] = .integer(place.count)
        }
        data["fatal"] = .bool(corruption.isFatal)
        return .object(data)
    }

    /// Ends exports and the server, then closes all nodes.
    ///
    /// - Throws: the first failure to make something durable; everything is closed all the same.
    public func close() async throws(BlockError) {
        isClosing = true
        try await letHeldUsersGo()
        var failure: BlockError?
        do throws(BlockError) {
            try await nbdServer?.stop()
        } catch { failure = error }
        nbdServer = nil
        // Those that are closing say so themselves when they are gone.
        for record in exports where !record.isClosing {
            let export = record.export
            do throws(BlockError) {
                try await export.seat.visit { () throws(BlockError) in try await export.close() }
            } catch { failure = failure ?? error }
            emit("BLOCK_EXPORT_DELETED", ["id": .string(record.identifier)])
        }
        exports.removeAll { !$0.isClosing }
        for ending in endings { await ending.task?.value }
        // What a job works on is its own until it ends; then its failure is its own too.
        for job in jobs { await job.task?.value }
        await untilNothingIsAside()
        try await onEachThread { graph in
            do throws(BlockError) { try await graph.closeAll() } catch {
                failure = failure ?? error
            }
        }
        for thread in ioThreads { thread.retire() }
        mainLoop?.letWorkersGo()
        if let failure { throw failure }
    }
}

extension StorageDaemon {
    /// - Throws: `cancelled` when the daemon ends: a command would find nodes and threads gone.
    func checkOpen() throws(BlockError) {
        guard !isClosing else { throw BlockError(.cancelled, "the daemon ends") }
    }
}

extension OptionReader {
    /// A string that must be there.
    func required(_ key: String) throws(BlockError) -> String {
        guard let text = try string(key) else {
            throw BlockError(.invalidArgument, "\(subject): parameter '\(key)' is missing")
        }
        return text
    }
}
