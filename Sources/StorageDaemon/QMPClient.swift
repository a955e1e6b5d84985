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
    private let socket: Socket
    private var framer = JSONFramer()
    private var waiting: [JSONValue] = []
    private let buffer: IOVector
    private var isBusy = false

    private init(_ socket: Socket) throws(BlockError) {
        self.socket = socket
        buffer = try IOVector(allocating: 64 << 10)
    }

    public var thread: IOThread { socket.thread }

    /// Connects, and negotiates.
    public static func connect(
        to address: SocketAddress, on thread: IOThread
    ) async throws(BlockError) -> QMPClient {
        let client = try QMPClient(await Socket.connect(to: address, on: thread))
        do throws(BlockError) {
            let greeting = try await client.receive()
            guard greeting["QMP"] != nil else {
                throw BlockError(
                    .protocolViolation, "\(address) does not greet as a QMP server does")
            }
            _ = try await client.execute("qmp_capabilities", [:])
        } catch {
            client.close()
            throw error
        }
        return client
    }

    public func execute(
        _ command: String, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        precondition(!isBusy, "a QMP client carries out one command at a time")
        isBusy = true
        defer { isBusy = false }
        let request: JSONValue = ["execute": .string(command), "arguments": arguments]
        let text = Array((request.text() + "\r\n").utf8)
        let message = try IOVector(allocating: text.count)
        text.withUnsafeBytes { message.copy(from: $0) }
        try await socket.send(message)
        while true {
            let message = try await receive()
            if let result = message["return"] { return result }
            if case .string(let reason)? = message["error"]?["desc"] {
                throw BlockError(.invalidArgument, "\(command): \(reason)")
            }
            // Events come between.
        }
    }

    private func receive() async throws(BlockError) -> JSONValue {
        while waiting.isEmpty {
            let count = try await socket.receive(buffer)
            guard count > 0 else {
                throw BlockError(.disconnected, "the daemon closed its QMP connection")
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
