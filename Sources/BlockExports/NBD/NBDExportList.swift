import BlockCore
import BlockIO
import BlockTLS
import NBDProtocol

/// What a client may ask of another NBD server before it uses an export.
public enum NBDRemoteServer {
    /// Everything that the server at `address` tells of its exports.
    ///
    /// - Parameters:
    ///   - credentials: the client's, where the server wants TLS.
    ///   - hostname: the name that the server's certificate must have; `nil` for any.
    /// - Throws: `disconnected` and what the handshake refuses with.
    public static func exports(
        at address: SocketAddress, _ credentials: TLSCredentials? = nil, hostname: String? = nil,
        on thread: IOThread
    ) async throws(BlockError) -> [NBDRemoteExport] {
        let socket = try await Socket.connect(to: address, on: thread)
        let connection = NBDClientConnection(socket)
        let outcome: Result<NBDClientHandshake.Action, BlockError>
        do throws(BlockError) {
            outcome = .success(
                try await connection.negotiate(.list, credentials, hostname: hostname))
        } catch {
            outcome = .failure(error)
        }
        connection.close()
        guard case .listed(let exports, _) = try outcome.get() else { return [] }
        return exports
    }

    /// Negotiates the use of an export on a connected socket, in plaintext and with simple replies.
    ///
    /// - Returns: what was agreed; the next byte on the socket belongs to the transmission.
    public static func use(
        _ name: String, on socket: Socket
    ) async throws(BlockError) -> NBDClientHandshake.Session {
        let connection = NBDClientConnection(socket)
        let action = try await connection.negotiate(
            .use(name: name, contexts: []), nil, hostname: nil, takesChunks: false)
        guard case .connected(let session) = action else {
            throw BlockError(.protocolViolation, "the handshake came to no agreement")
        }
        return session
    }
}

/// Carries a client's handshake over a socket. Confined to its thread.
private final class NBDClientConnection {
    private let socket: Socket
    private var channel: any NBDChannel

    init(_ socket: Socket) {
        self.socket = socket
        channel = socket
    }

    /// - Returns: the last action of the handshake.
    func negotiate(
        _ goal: NBDClientHandshake.Goal, _ credentials: TLSCredentials?, hostname: String?,
        takesChunks: Bool = true
    ) async throws(BlockError) -> NBDClientHandshake.Action {
        var handshake = NBDClientHandshake(
            goal, usesTLS: credentials != nil, takesChunks: takesChunks)
        // A server says nothing after its last reply: what is received belongs to the handshake.
        let buffer = try IOVector(allocating: 16 << 10)
        while true {
            let action = try handshake.advance()
            switch action {
            case .receive:
                let count = try await channel.receive(buffer, isLikelyThere: false)
                guard count > 0 else {
                    throw BlockError(
                        .disconnected, "the server closed the connection during the handshake")
                }
                buffer.slice(0, count).array.withUnsafeBytes { handshake.receive($0) }
            case .send(let bytes): try await send(bytes)
            case .startTLS:
                guard let credentials else { return action }
                let secure = try NBDSecureChannel(socket, credentials, hostname: hostname)
                try await secure.handshake()
                channel = secure
                handshake.tlsEstablished()
            case .listed(_, let goodbye):
                // The server may hang up first.
                try? await send(goodbye)
                return action
            case .connected: return action
            }
        }
    }

    private func send(_ bytes: [UInt8]) async throws(BlockError) {
        let memory = try IOVector(allocating: bytes.count)
        bytes.withUnsafeBytes { memory.copy(from: $0) }
        try await channel.send(memory)
    }

    func close() {
        channel.shutdown()
        channel.close()
    }
}
