import BlockCore
import BlockIO
import BlockTLS

/// A connection's bytes inside TLS. Confined to its thread.
///
/// Invariants:
/// 1. Ciphertext leaves in the order in which it was made: what the socket did not take waits in
///    `unsent`, and nothing is encrypted while it does.
/// 2. Plaintext counts as sent when all its ciphertext has left. What was encrypted without leaving is
///    `encryptedAhead` of the bytes that the caller sends next.
/// 3. At most ``pieceBytesMax`` of plaintext is encrypted ahead of the socket.
final class NBDSecureChannel: NBDChannel, @unchecked Sendable {
    /// Plaintext that is encrypted before the socket is asked to take it.
    static let pieceBytesMax = 256 << 10
    private static let inputBytes = 64 << 10

    private let socket: Socket
    private let session: TLSSession
    private var input: IOBuffer
    private var unsent = IOVector()
    private var encryptedAhead = 0
    private var isSending = false
    private var isEnded = false

    /// - Parameter hostname: what a client expects in its server's certificate.
    init(
        _ socket: Socket, _ credentials: TLSCredentials, hostname: String? = nil
    ) throws(BlockError) {
        self.socket = socket
        session = try TLSSession(credentials, hostname: hostname)
        input = try IOBuffer(count: Self.inputBytes)
    }

    /// Who the client is; see ``TLSSession/peerName``.
    var peerName: String? { session.peerName }

    /// Establishes TLS.
    ///
    /// - Throws: `permissionDenied` when the client is not accepted; it was told why.
    func handshake() async throws(BlockError) {
        while true {
            do throws(BlockError) {
                let progress = try session.handshake()
                try await socket.send(session.takeCiphertext())
                if progress == .done { return }
                try await receiveCiphertext()
            } catch {
                // The alert that says why; the client may be gone.
                try? await socket.send(session.takeCiphertext())
                throw error
            }
        }
    }

    private func receiveCiphertext() async throws(BlockError) {
        // The session is done with the memory: it says that it needs more.
        let slice = input.prefix(Self.inputBytes)
        let count = try await socket.receive(IOVector(slice))
        if count == 0 {
            session.receiveEnd()
        } else {
            try session.receive(slice.slice(0, count))
        }
    }

    // MARK: Channel

    func untilTaken(nanosecondsMax: UInt64) async -> Bool {
        await socket.untilTaken(nanosecondsMax: nanosecondsMax)
    }

    func receive(_ vector: IOVector, isLikelyThere: Bool) async throws(BlockError) -> Int {
        if isEnded { return 0 }
        while true {
            var result = TLSSession.ReadResult.needsInput
            do throws(BlockError) {
                result = try session.read(into: Self.firstSegment(of: vector))
            } catch {
                answerPeer()
                throw error
            }
            // A change of keys wants an answer of its own.
            answerPeer()
            switch result {
            case .bytes(let count): return count
            case .closed:
                isEnded = true
                return 0
            case .needsInput: try await receiveCiphertext()
            }
        }
    }

    private static func firstSegment(of vector: IOVector) -> UnsafeMutableRawBufferPointer {
        var result: UnsafeMutableRawBufferPointer?
        vector.forEachSegment { if result == nil, $0.count > 0 { result = $0.bytes } }
        guard let result else { preconditionFailure("receiving nothing") }
        return result
    }

    /// Sends what reading made, unless a send is under way that takes it along.
    private func answerPeer() {
        guard !isSending else { return }
        unsent.append(session.takeCiphertext())
        _ = sendUnsentNow()
    }

    func sendNow(_ vector: IOVector) -> Int? {
        precondition(encryptedAhead == 0)
        guard !isSending, sendUnsentNow() else { return nil }
        var done = 0
        while done < vector.count {
            let count = min(vector.count - done, Self.pieceBytesMax)
            do throws(BlockError) {
                try encrypt(vector.slice(done, count))
            } catch {
                return -Int(error.systemError)
            }
            guard sendUnsentNow() else {
                encryptedAhead = count
                break
            }
            done += count
        }
        return done
    }

    func send(_ vector: IOVector) async throws(BlockError) {
        isSending = true
        defer { isSending = false }
        var done = encryptedAhead
        encryptedAhead = 0
        while true {
            // With what reading made meanwhile.
            unsent.append(session.takeCiphertext())
            if unsent.isEmpty, done == vector.count { return }
            let ciphertext = unsent
            unsent = IOVector()
            try await socket.send(ciphertext)
            let count = min(vector.count - done, Self.pieceBytesMax)
            try encrypt(vector.slice(done, count))
            done += count
            // Others get their turn between two pieces of much data.
            if done < vector.count { await Task.yield() }
        }
    }

    private func encrypt(_ plaintext: IOVector) throws(BlockError) {
        var failure: BlockError?
        plaintext.forEachSegment { segment in
            guard failure == nil else { return }
            do throws(BlockError) {
                try session.write(UnsafeRawBufferPointer(segment.bytes))
            } catch {
                failure = error
            }
        }
        unsent.append(session.takeCiphertext())
        if let failure { throw failure }
    }

    /// - Returns: whether all ciphertext has left.
    private func sendUnsentNow() -> Bool {
        guard !unsent.isEmpty else { return true }
        guard let sent = socket.sendNow(unsent), sent > 0 else { return false }
        unsent = sent == unsent.count ? IOVector() : unsent.slice(sent, unsent.count - sent)
        return unsent.isEmpty
    }

    func shutdownReceiving() {
        socket.shutdownReceiving()
    }

    func shutdown() {
        socket.shutdown()
    }

    func close() {
        // As far as the socket takes it at once: the goodbye of a client that reads.
        session.close()
        unsent.append(session.takeCiphertext())
        _ = sendUnsentNow()
        socket.close()
    }
}
