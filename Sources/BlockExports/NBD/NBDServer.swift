import BlockCore
import BlockGraph
import BlockIO
import BlockTLS
import NBDProtocol
import Synchronization

/// An NBD server: listeners, exports by name, clients. Confined to its thread; each export, and the clients
/// that use it, are on the thread of the export's node.
public final class NBDServer: @unchecked Sendable {
    public struct Options: Sendable {
        /// Clients that have not begun to use an export by then are cut off; 0 waits for ever.
        public var handshakeSeconds = 10
        /// Clients at a time; 0 for no limit. Others wait until one leaves: they are not accepted.
        public var connectionCountMax = 100
        /// What the requests and unsent replies of all clients may hold, in bytes. Past that each may hold
        /// a ``clientShare``th of it, and a request; of a long read whose reply may be divided, a piece.
        public var bytesInFlightMax = 256 << 20
        static let clientShare = 64
        /// Clients have to use TLS, and this is what they are shown; `nil` for no TLS.
        public var credentials: TLSCredentials?
        /// Whether a client may come in, by its certificate's distinguished name or its key's user
        /// name; a client without either is turned away. `nil` lets in whom the credentials accept.
        public var authorize: (@Sendable (String) -> Bool)?

        public init() {}
    }

    public let thread: IOThread
    let options: Options
    private var listeners: [Listener] = []
    private var exportsInOrder: [NBDExport] = []
    private(set) var connections: [NBDConnection] = []
    /// Who waits until the last of them is gone.
    private let departure = WaitQueue()
    /// Listeners that wait for a client to leave.
    private let room = WaitQueue()
    private let bytesInFlight = Atomic<Int>(0)
    private var isStopped = false
    private let logger: @Sendable (String) -> Void
    /// Called when a client has left, none is there, and one has used an export since the last call: what
    /// `qemu-nbd` ends on. Whoever only asks what there is, or fails at negotiation, ends nothing.
    public var lastClientLeft: (() -> Void)?
    private var wasUsed = false

    public init(
        on thread: IOThread, _ options: Options = Options(),
        log: @escaping @Sendable (String) -> Void = { _ in }
    ) {
        self.thread = thread
        self.options = options
        logger = log
    }

    /// 0 waits for ever; so does, in effect, what is too long to count.
    var handshakeNanoseconds: UInt64 {
        UInt64(clamping: options.handshakeSeconds).multiplied(by: 1_000_000_000) ?? .max
    }

    func log(_ message: String) {
        logger(message)
    }

    /// Where it listens.
    public var addresses: [SocketAddress] { listeners.map(\.address) }
    public var clientCount: Int { connections.count }

    // MARK: Exports

    /// - Throws: `alreadyExists` when an export has the name.
    public func add(_ export: NBDExport) throws(BlockError) {
        guard exportNamed(export.name) == nil else {
            throw BlockError(.alreadyExists, "there is an NBD export '\(export.name)' already")
        }
        export.canMultiConnect = options.connectionCountMax != 1
        exportsInOrder.append(export)
    }

    /// Takes an export off the list: no new client finds it. Close it then.
    public func remove(_ export: NBDExport) {
        exportsInOrder.removeAll { $0 === export }
    }

    public func exportNamed(_ name: String) -> NBDExport? {
        exportsInOrder.first { $0.name.utf8.elementsEqual(name.utf8) }
    }

    /// What clients may be told of the exports.
    func catalogue() async -> NBDFixedCatalogue {
        var exports: [NBDExportInfo] = []
        for export in exportsInOrder {
            let info = try? await export.seat.visit { () throws(BlockError) in export.info }
            if let info = info ?? nil { exports.append(info) }
        }
        return NBDFixedCatalogue(exports)
    }

    // MARK: Clients

    /// Serves the clients that come to `listener`.
    public func listen(on listener: Listener) {
        thread.preconditionOnThread()
        listeners.append(listener)
        thread.spawn { [self] in
            while !isStopped {
                do throws(BlockError) {
                    await untilRoom()
                    guard let socket = try await listener.accept() else { return }
                    // One may have come to another listener meanwhile.
                    await untilRoom()
                    serve(socket)
                } catch {
                    // Out of descriptors, say: the clients that are there go on.
                    log("\(error)")
                    await thread.sleep(nanoseconds: 100_000_000)
                }
            }
        }
    }

    /// Of clients that have left, and whose requests storage still holds back: they count for themselves.
    private static let goneCountMin = 16

    private var isFull: Bool {
        let max = options.connectionCountMax
        guard max > 0 else { return false }
        let goneCount = connections.count { $0.isGone }
        return connections.count - goneCount >= max
            || goneCount >= Swift.max(max, Self.goneCountMin)
    }

    /// Returns when another client may come, or none will.
    private func untilRoom() async {
        while isFull, !isStopped { await room.wait() }
    }

    /// A client has left; its requests may be under way still.
    func gone(_ connection: NBDConnection) {
        connection.isGone = true
        room.wakeAll()
    }

    /// From any thread.
    func noteBytes(_ count: Int) {
        bytesInFlight.wrappingAdd(count, ordering: .relaxed)
    }

    /// What one client may hold before it has to wait for itself.
    var clientBytesMax: Int {
        holdsMuch ? options.bytesInFlightMax / Options.clientShare : .max
    }

    /// Whether all clients together hold as much as they may.
    var holdsMuch: Bool {
        bytesInFlight.load(ordering: .relaxed) >= options.bytesInFlightMax
    }

    /// Serves one client.
    public func serve(_ socket: Socket) {
        let isFull = isFull
        guard !isStopped, !isFull else {
            if isFull { log("a client was turned away: \(connections.count) are there") }
            socket.close()
            return
        }
        let connection = NBDConnection(socket, server: self)
        connections.append(connection)
        connection.seat.spawn { [self] in
            await connection.run()
            thread.spawn { [self] in left(connection) }
        }
    }

    private func left(_ connection: NBDConnection) {
        connections.removeAll { $0 === connection }
        if connection.hasNegotiated { wasUsed = true }
        room.wakeAll()
        guard connections.isEmpty else { return }
        departure.wakeAll()
        guard wasUsed else { return }
        wasUsed = false
        lastClientLeft?()
    }

    /// Stops listening, ends all clients and exports, and waits for them.
    ///
    /// - Throws: the first failure to close an export; all are closed all the same.
    public func stop() async throws(BlockError) {
        isStopped = true
        // Whoever is listed from here on is being stopped: nobody new comes in.
        for listener in listeners { listener.close() }
        room.wakeAll()
        for connection in connections { connection.seat.spawn { connection.shutdown() } }
        for export in exportsInOrder { export.seat.spawn { export.beginClosing() } }
        while !connections.isEmpty { await departure.wait() }
        var failure: BlockError?
        for export in exportsInOrder {
            do throws(BlockError) {
                try await export.seat.visit { () throws(BlockError) in try await export.close() }
            } catch { failure = failure ?? error }
        }
        exportsInOrder = []
        if let failure { throw failure }
    }
}
