import BlockCore
import BlockIO
import QMP

/// Something that carries out QMP commands: a daemon in this process, or one behind a socket.
public protocol QMPExecutor: AnyObject, Sendable {
    /// Where it is confined to.
    var thread: IOThread { get }
    /// - Throws: with the daemon's words when it refuses.
    func execute(_ command: String, _ arguments: JSONValue) async throws(BlockError) -> JSONValue
}

/// A client of a QMP socket. Confined to its thread; one command at a time.
public final class QMPClient: QMPExecutor, @unchecked Sendable {
    private let address: SocketAddress
    private let socket: Socket
    private var framer = JSONFramer()
    private var waiting: [JSONValue] = []
    private let buffer: IOVector
    private var isGivenUp = false
    /// When the command was sent that is not answered yet, on the thread's clock.
    public private(set) var waitingSince: UInt64?
    /// The connection is of no use any more.
    public private(set) var isBroken = false

    private init(_ socket: Socket, to address: SocketAddress) throws(BlockError) {
        self.address = address
        self.socket = socket
        buffer = try IOVector(allocating: 64 << 10)
    }

    public var thread: IOThread { socket.thread }

    /// Connects, and negotiates.
    ///
    /// - Throws: `timedOut` when the greeting takes longer than `nanosecondsMax`.
    public static func connect(
        to address: SocketAddress, on thread: IOThread, nanosecondsMax: UInt64 = 30_000_000_000
    ) async throws(BlockError) -> QMPClient {
        let client = try QMPClient(await Socket.connect(to: address, on: thread), to: address)
        let timer = IOTimer(on: thread)
        thread.spawn { if await timer.wait(nanoseconds: nanosecondsMax) { client.giveUp() } }
        defer { timer.cancel() }
        do throws(BlockError) {
            try await client.negotiate()
        } catch {
            client.close()
            throw error
        }
        return client
    }

    private func negotiate() async throws(BlockError) {
        let greeting = try await exchange { () throws(BlockError) in try await self.receive() }
        guard greeting["QMP"] != nil else {
            throw BlockError(.protocolViolation, "\(address) does not greet as a QMP server does")
        }
        _ = try await execute("qmp_capabilities", [:])
    }

    public func execute(
        _ command: String, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        let request: JSONValue = ["execute": .string(command), "arguments": arguments]
        return try await exchange { () throws(BlockError) in
            try await self.send(request)
            while true {
                let message = try await self.receive()
                if let result = message["return"] { return result }
                if case .string(let reason)? = message["error"]?["desc"] {
                    throw BlockError(.invalidArgument, "\(command): \(reason)")
                }
                // Events come between.
            }
        }
    }

    /// Something that the daemon answers.
    ///
    /// - Throws: `disconnected` or `timedOut`, with the daemon's address, when it does not.
    private func exchange(
        _ body: () async throws(BlockError) -> JSONValue
    ) async throws(BlockError) -> JSONValue {
        precondition(waitingSince == nil, "a QMP client carries out one command at a time")
        waitingSince = thread.now
        defer { waitingSince = nil }
        do throws(BlockError) {
            return try await body()
        } catch {
            if isGivenUp {
                throw BlockError(
                    .timedOut, "the daemon at \(address) does not answer",
                    remedy: "it may be stopped, or its monitor busy with another client")
            }
            guard error.code == .disconnected else { throw error }
            isBroken = true
            throw error.doing("the daemon at \(address)")
        }
    }

    private func send(_ request: JSONValue) async throws(BlockError) {
        let text = Array((request.text() + "\r\n").utf8)
        let message = try IOVector(allocating: text.count)
        text.withUnsafeBytes { message.copy(from: $0) }
        try await socket.send(message)
    }

    /// Waits for no answer any more: the command that is under way and those to come fail with `timedOut`.
    public func giveUp() {
        isGivenUp = true
        isBroken = true
        socket.shutdown()
    }

    private func receive() async throws(BlockError) -> JSONValue {
        while waiting.isEmpty {
            let count = try await socket.receive(buffer)
            guard count > 0 else {
                throw BlockError(.disconnected, "the connection was closed")
            }
            for byte in buffer.slice(0, count).array {
                switch framer.take(byte) {
                case nil: continue
                case .success(let message): waiting.append(message)
                case .failure:
                    throw BlockError(.protocolViolation, "the QMP server sent no JSON")
                }
            }
        }
        return waiting.removeFirst()
    }

    public func close() {
        socket.shutdown()
        socket.close()
    }
}
