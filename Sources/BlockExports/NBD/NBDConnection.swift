import BlockCore
import BlockGraph
import BlockIO
import BlockTLS
import NBDProtocol

/// One client of an ``NBDServer``. Confined to where its seat stands: on the server's thread until the client
/// has chosen an export, on the export's from then on, wherever that moves.
///
///     socket ─▶ NBDInput ─▶ rules ─▶ one task a request ─▶ edge ─▶ … ─▶ disk
///     socket ◀─ NBDOutput ◀─ reply ◀──────┘
///
/// Invariants:
/// 1. Every request gets exactly one reply, or the connection ends.
/// 2. What the requests and unsent replies of one client hold is bounded: past the limits nothing more
///    is received from it. Other clients do not notice. The limit is lower while all clients together
///    hold much (``NBDServer/Options/bytesInFlightMax``).
/// 3. While there are many unsent replies, or reads of ``readingBytesMax`` are under way, no further read
///    begins: reads go on as the client takes replies. Other requests of the client do not wait for it. One
///    read may always be under way; while all clients together hold much, a long one goes in pieces.
final class NBDConnection: @unchecked Sendable {
    /// Requests of one client in flight.
    static let requestCountMax = 512
    /// Bytes of payload that one client's requests and unsent replies hold.
    static let bytesInFlightMax = 64 << 20
    /// Bytes of one client's reads that are under way, and not replied to yet.
    static let readingBytesMax = 16 << 20

    /// How long a client that is being sent away may take to receive the replies it is owed.
    static let closingNanosecondsMax: UInt64 = 1_000_000_000
    /// Requests that are started in a row before other clients get their turn, and the data they may be about.
    static let turnRequestCountMax = 128
    static let turnBytesMax = 512 << 10

    /// Of ``letRequestsGather()``: replies that make it worth a look; how long a client that takes none
    /// holds up its own requests; how often it is left out.
    private static let gatherBytesMin = 256 << 10
    private static let gatherNanosecondsMax: UInt64 = 500_000
    private static let gatherPauseCount = 16

    private unowned let server: NBDServer
    let seat: IOSeat
    private let socket: Socket
    private var channel: any NBDChannel
    private let output: NBDOutput
    private var export: NBDExport?

    private var replyPace = ReplyPace()
    /// How often not to wait in ``letRequestsGather()``, after there was nothing to wait for.
    private var gatherPause = 0
    /// Reads that wait until the client has taken replies; ``catchUp()`` is at work while there are any.
    private var postponed: [Postponed] = []
    private var isCatchingUp = false
    /// It has had reads postponed.
    private var takesMuch = false
    private var requestCount = 0
    /// In memory.
    private(set) var bytesInFlight = 0 {
        didSet { server.noteBytes(bytesInFlight - oldValue) }
    }
    /// Of reads that have not begun: they count as what the client asks for, and take no memory.
    private var postponedBytes = 0
    private var readingBytes = 0
    private var readSleeper: UnsafeContinuation<Void, Never>?
    /// It has left, as far as it can tell: the server's to say.
    var isGone = false
    /// It has chosen an export.
    private(set) var hasNegotiated = false
    private var roomSleeper: UnsafeContinuation<Void, Never>?
    private var doneSleeper: UnsafeContinuation<Void, Never>?
    private var rules: NBDRequestRules?
    private var session: NBDSession?
    private(set) var isClosing = false
    /// The client sends nothing any more.
    private var hasLeft = false
    /// Requests that may end early do: nobody has use for more of them.
    var isEnding: Bool { isClosing || hasLeft }
    private var isDone = false
    private let closingTimer: IOTimer

    private struct Postponed {
        let execution: NBDRequestExecution
        let cost: Int
    }

    init(_ socket: Socket, server: NBDServer) {
        self.server = server
        seat = IOSeat(on: socket.thread)
        self.socket = socket
        channel = socket
        output = NBDOutput(socket, seat: seat)
        closingTimer = IOTimer(on: seat)
        output.sent = { [unowned self] count in
            bytesInFlight -= count
            wakeForRoom()
        }
    }

    /// Ends the connection. Nothing more is received; requests in flight are finished and replied to,
    /// as long as the client takes the replies within ``closingNanosecondsMax``.
    func shutdown() {
        guard !isClosing, !isDone else { return }
        isClosing = true
        channel.shutdownReceiving()
        if let sleeper = roomSleeper {
            roomSleeper = nil
            sleeper.resume()
        }
        limitClosing()
    }

    private func limitClosing() {
        seat.spawn { [self] in
            if await closingTimer.wait(nanoseconds: Self.closingNanosecondsMax) { abandon() }
        }
    }

    /// Ends the connection at once, for one that is of no use any more.
    func abandon() {
        isClosing = true
        if !isDone { channel.shutdown() }
    }

    func exportResized(to size: Int) {
        rules?.size = size
    }

    // MARK: Life

    /// Serves the client until it leaves.
    func run() async {
        do throws(BlockError) {
            var input = try NBDInput()
            if let session = try await negotiate(&input), let export {
                hasNegotiated = true
                await join(export)
                // It may have been removed, or changed, while the client made up its mind.
                let edge = try export.edge(ofSize: session.export.size)
                try await transmit(session, edge, &input)
            }
        } catch {
            if !isClosing {
                server.log("a client's connection ended: \(error)")
                // Whoever breaks the protocol is not waited for.
                isClosing = true
                limitClosing()
            }
        }
        hasLeft = true
        let server = server
        server.thread.spawn { server.gone(self) }
        while requestCount > 0 {
            await withUnsafeContinuation { doneSleeper = $0 }
        }
        await output.flush()
        isDone = true
        closingTimer.cancel()
        channel.close()
        export?.remove(self)
    }

    // MARK: Thread

    /// Goes to where the export is, and becomes one of its connections.
    private func join(_ export: NBDExport) async {
        while !export.seat.isCurrent {
            let thread = export.seat.thread
            move(to: thread)
            seat.move(to: thread)
            await seat.arrive()
        }
        export.add(self)
    }

    /// All but the seat, which follows.
    func move(to thread: IOThread) {
        socket.move(to: thread)
    }

    // MARK: Handshake

    private func negotiate(_ input: inout NBDInput) async throws(BlockError) -> NBDSession? {
        let timer = IOTimer(on: seat)
        if server.handshakeNanoseconds > 0 {
            seat.spawn { [self] in
                if await timer.wait(nanoseconds: server.handshakeNanoseconds) { channel.shutdown() }
            }
        }
        defer { timer.cancel() }
        let credentials = server.options.credentials
        var handshake = NBDHandshake(tls: credentials == nil ? .none : .required)
        try queue(NBDHandshake.greeting)
        while true {
            switch handshake.advance(catalogue: await server.catalogue()) {
            case .receive:
                guard try await input.receive(from: channel) else { return nil }
                handshake.receive(input.bytes)
                input.drop(input.available)
            case .send(let bytes):
                try queue(bytes)
                // Replies to a flood of options do not pile up.
                await output.flush()
            case .startTLS(let bytes):
                try queue(bytes)
                await output.flush()
                guard let credentials else {
                    throw BlockError(.unsupported, "TLS was not offered")
                }
                try await startTLS(credentials)
                handshake.tlsEstablished()
            case .transmit(let bytes, let session):
                try queue(bytes)
                try input.prepend(handshake.takeRemainder())
                // From here on the way to the export is not interrupted: it may be removed at any wait.
                await output.flush()
                export = server.exportNamed(session.export.name)
                return session
            case .close(let bytes, let reason):
                try queue(bytes)
                if let reason { server.log("a client's handshake failed: \(reason)") }
                return nil
            }
        }
    }

    private func startTLS(_ credentials: TLSCredentials) async throws(BlockError) {
        let secure = try NBDSecureChannel(socket, credentials)
        try await secure.handshake()
        channel = secure
        output.channel = secure
        guard let authorize = server.options.authorize else { return }
        let name = secure.peerName
        guard let name, authorize(name) else {
            throw BlockError(
                .permissionDenied, "the client '\(name ?? "without a name")' is not authorized")
        }
    }

    private func queue(_ bytes: [UInt8]) throws(BlockError) {
        bytesInFlight += bytes.count
        try output.append(bytes)
    }

    // MARK: Requests

    private func transmit(
        _ session: NBDSession, _ edge: Edge, _ input: inout NBDInput
    ) async throws(BlockError) {
        self.session = session
        var rules = NBDRequestRules(session)
        rules.size = edge.size
        self.rules = rules
        let headerCount = NBDRequestHeader.count(in: session.mode)
        var turnCount = 0
        var turnBytes = 0
        // Requests since the last receive.
        var batchCount = 0
        while !isClosing {
            turnCount += 1
            if turnCount == Self.turnRequestCountMax || turnBytes >= Self.turnBytesMax {
                turnCount = 0
                turnBytes = 0
                await Task.yield()
            }
            while input.available < headerCount {
                await letRequestsGather()
                // A client that sends one request at a time waits for its reply, which leaves first.
                let isLikelyThere = batchCount != 1
                replyPace.received(batchCount)
                output.batchCountMax = replyPace.batchCount
                batchCount = 0
                guard
                    try await input.receive(from: channel, isLikelyThere: isLikelyThere)
                else {
                    if input.available > 0, !isClosing {
                        throw BlockError(.disconnected, "the client went away in a request")
                    }
                    return
                }
            }
            let disposition = self.rules?.judge(input.bytes) ?? .disconnect
            input.drop(headerCount)
            batchCount += 1
            switch disposition {
            case .execute(let request):
                let cost = request.payloadCount + replyBytesMax(request)
                turnBytes += cost
                if !hasRoom {
                    await waitForRoom()
                    if isClosing { return }
                }
                var payload = IOVector()
                if request.payloadCount > 0 {
                    payload = try await input.take(request.payloadCount, from: channel)
                }
                start(request, payload, cost, edge)
            case .refuse(let request, let refusal, let swallow):
                try await input.skip(swallow, from: channel)
                let message = mode == .simple ? "" : refusal.message(for: request)
                try reply(failure: refusal.error, message, to: request)
                if !hasRoom { await waitForRoom() }
            case .disconnect:
                return
            case .drop(let reason):
                throw BlockError(.protocolViolation, reason)
            }
        }
    }

    /// A client with many long reads in flight has replies to take before it needs more of them. Waiting
    /// until it took most lets its requests gather: one turn of the loop, one receive and one send then
    /// serve many. With fewer, or short ones, it would have nothing to do while it is waited for (``ReplyPace``).
    private func letRequestsGather() async {
        guard output.takeQueuedBytes() >= Self.gatherBytesMin, !output.isBehind else { return }
        if gatherPause > 0 {
            gatherPause -= 1
            return
        }
        let waited = await channel.untilTaken(nanosecondsMax: Self.gatherNanosecondsMax)
        if !waited { gatherPause = Self.gatherPauseCount }
    }

    /// What a request's reply may hold in memory while it is made.
    private func replyBytesMax(_ request: NBDRequest) -> Int {
        switch request.command {
        case .read: request.range.count
        case .cache: min(request.range.count, NBDRequestExecution.prefetchBytesMax)
        case .blockStatus: NBDRequestExecution.statusBytesMax(request)
        default: 0
        }
    }

    private func start(_ request: NBDRequest, _ payload: IOVector, _ cost: Int, _ edge: Edge) {
        // Nobody is there to be answered.
        if request.command == .read, output.isBroken { return }
        let execution = NBDRequestExecution(request: request, connection: self, edge: edge)
        if request.command == .read, isCatchingUp || !mayRead(cost) {
            postpone(execution, cost)
        } else {
            requestCount += 1
            begin(execution, payload, cost)
        }
    }

    /// Carries out a request that is counted: at once, or by a task.
    private func begin(_ execution: NBDRequestExecution, _ payload: IOVector, _ cost: Int) {
        let inPieces = execution.isDivisible && server.holdsMuch
        if !inPieces, execution.runNow(payload) { return countOut() }
        let held = inPieces ? NBDRequestExecution.pieceBytesMax : cost
        let read = execution.request.command == .read ? held : 0
        bytesInFlight += held
        readingBytes += read
        seat.spawn { [self] in
            await execution.run(payload, inPieces: inPieces)
            bytesInFlight -= held
            readingBytes -= read
            if read > 0, let sleeper = readSleeper {
                readSleeper = nil
                sleeper.resume()
            }
            countOut()
        }
    }

    private func countOut() {
        requestCount -= 1
        wakeForRoom()
        if requestCount == 0, let sleeper = doneSleeper {
            doneSleeper = nil
            sleeper.resume()
        }
    }

    /// Whether a read may begin now: the first always, where its reply can leave.
    private func mayRead(_ cost: Int) -> Bool {
        if output.isFull { return false }
        return readingBytes == 0
            || readingBytes + cost <= min(Self.readingBytesMax, server.clientBytesMax)
    }

    /// Returns when a read may begin, or nobody is there to be answered. What it waits for is the client's own:
    /// others may hold as much as they like.
    private func untilMayRead(_ cost: Int) async {
        while !output.isBroken, !mayRead(cost) {
            if output.isFull {
                await output.untilRoom()
            } else {
                await withUnsafeContinuation { readSleeper = $0 }
            }
        }
    }

    /// Has a read wait for the client: data that is read long before it can leave takes memory, and is
    /// no longer in the processor's cache when it does.
    private func postpone(_ execution: NBDRequestExecution, _ cost: Int) {
        requestCount += 1
        postponedBytes += cost
        postponed.append(Postponed(execution: execution, cost: cost))
        guard !isCatchingUp else { return }
        isCatchingUp = true
        if !takesMuch {
            takesMuch = true
            socket.holdMore()
        }
        seat.spawn { await self.catchUp() }
    }

    /// Begins the reads that were postponed, in their order, as the client takes replies.
    private func catchUp() async {
        var turnBytes = 0
        while !postponed.isEmpty {
            let batch = postponed
            postponed = []
            for next in batch {
                if turnBytes >= Self.turnBytesMax {
                    turnBytes = 0
                    await Task.yield()
                }
                await untilMayRead(next.cost)
                turnBytes += next.cost
                postponedBytes -= next.cost
                // Nobody is there to be answered, or it begins.
                if output.isBroken {
                    countOut()
                } else {
                    begin(next.execution, IOVector(), next.cost)
                    // In pieces it holds less than it asked for.
                    wakeForRoom()
                }
            }
        }
        isCatchingUp = false
    }

    private var bytesMax: Int { min(Self.bytesInFlightMax, server.clientBytesMax) }

    /// Whether another request is received.
    private var hasRoom: Bool {
        requestCount < Self.requestCountMax && bytesInFlight + postponedBytes <= bytesMax
    }

    private func waitForRoom() async {
        while !isClosing, !hasRoom {
            await withUnsafeContinuation { roomSleeper = $0 }
        }
    }

    private func wakeForRoom() {
        guard let sleeper = roomSleeper, hasRoom else { return }
        roomSleeper = nil
        sleeper.resume()
    }

    // MARK: Replies

    /// Waits until a part of a long reply can leave.
    ///
    /// - Throws: `disconnected` when nobody is there to take it.
    func untilReplyLeaves() async throws(BlockError) {
        await output.untilRoom()
        if output.isBroken { throw BlockError(.disconnected, "the client is gone") }
    }

    var mode: NBDReplyMode { session?.mode ?? .simple }

    /// What status is aligned to: the smallest block that clients are told of.
    var blockSize: Int { Int(session?.export.blockSizes.minimum ?? 1) }

    func context(_ identifier: UInt32) -> NBDContext? { session?.context(identifier) }

    /// The dirty bitmap behind a context of the export.
    func bitmap(named name: String) -> DirtyBitmap? { export?.bitmap(named: name) }

    var statusRules: NBDRequestRules? { rules }

    /// Queues a message and its data; what is queued counts until it is sent.
    ///
    /// - Parameter isLast: whether it ends its request's reply.
    func reply(
        capacity: Int, data: IOVector? = nil, isLast: Bool = true,
        _ encode: (UnsafeMutableRawBufferPointer) -> Int
    ) throws(BlockError) {
        try output.append(capacity: capacity, data: data, isLast: isLast) { memory in
            let count = encode(memory)
            bytesInFlight += count + (data?.count ?? 0)
            return count
        }
    }

    func reply(
        failure code: NBDErrorCode, _ message: String, to request: NBDRequest
    ) throws(BlockError) {
        try reply(capacity: NBDReply.failureCountMax(message)) { memory in
            NBDReply.failure(code, message, replyingTo: request, mode: mode, to: memory)
        }
    }
}
