import BlockCore
import CGnuTLS

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// One side of one TLS connection, as a transform of memory: ciphertext in, plaintext out, and back.
/// It does no I/O and never waits.
///
/// Give received bytes to ``receive(_:)``; drive ``handshake()`` until it is done; then
/// ``read(into:)`` and ``write(_:)``. After every call, send what ``takeCiphertext()`` returns, after
/// a call that threw too: it may hold the alert that tells the peer why.
///
/// Confined to one thread at a time: its owner's.
public final class TLSSession: @unchecked Sendable {
    /// How far a handshake is.
    public enum Handshake: Equatable, Sendable {
        case done
        /// More must be received first.
        case needsInput
    }

    /// What a read came to.
    public enum ReadResult: Equatable, Sendable {
        /// Plaintext bytes written to the memory, at least one.
        case bytes(Int)
        /// More must be received first.
        case needsInput
        /// The peer said goodbye: nothing follows.
        case closed
    }

    private let session: gnutls_session_t
    private let credentials: TLSCredentials
    private let queues = TLSQueues()
    /// Memory that GnuTLS reads during the handshake.
    private var texts: [UnsafeMutablePointer<CChar>] = []
    private var expectations: UnsafeMutablePointer<gnutls_typed_vdata_st>?
    private var failure: BlockError?
    public private(set) var isEstablished = false

    /// - Parameter hostname: the name that a client expects in its server's certificate; `nil` takes
    ///   any certificate that its authority signed. Servers pass `nil`.
    /// - Throws: `exhausted`, `invalidArgument`.
    public init(_ credentials: TLSCredentials, hostname: String? = nil) throws(BlockError) {
        self.credentials = credentials
        let isServer = credentials.endpoint == .server
        var pointer: gnutls_session_t?
        let flags = UInt32(isServer ? GNUTLS_SERVER : GNUTLS_CLIENT) | UInt32(GNUTLS_NONBLOCK)
        guard gnutls_init(&pointer, flags) == 0, let pointer else {
            throw BlockError(.exhausted, "no memory for a TLS session")
        }
        session = pointer
        gnutls_session_set_ptr(session, Unmanaged.passUnretained(self).toOpaque())
        connectQueues()
        var result = gnutls_priority_set(session, credentials.priority)
        if result == 0 { result = setCredentials() }
        guard result == 0 else {
            throw BlockError(
                .invalidArgument, "cannot set up TLS: \(TLSCredentials.describe(result))")
        }
        if case .certificate = credentials.kind {
            expectPeer(hostname: isServer ? nil : hostname)
        }
    }

    deinit {
        gnutls_deinit(session)
        expectations?.deallocate()
        for text in texts { free(text) }
    }

    private func connectQueues() {
        gnutls_transport_set_ptr(session, Unmanaged.passUnretained(queues).toOpaque())
        gnutls_transport_set_pull_function(session) { pointer, target, count in
            guard let pointer, let target else { return -1 }
            let queues = Unmanaged<TLSQueues>.fromOpaque(pointer).takeUnretainedValue()
            return queues.pull(UnsafeMutableRawBufferPointer(start: target, count: count))
        }
        gnutls_transport_set_push_function(session) { pointer, source, count in
            guard let pointer, let source else { return -1 }
            let queues = Unmanaged<TLSQueues>.fromOpaque(pointer).takeUnretainedValue()
            return queues.push(UnsafeRawBufferPointer(start: source, count: count))
        }
    }

    private func setCredentials() -> Int32 {
        switch credentials.kind {
        case .certificate(let pointer, _):
            if credentials.endpoint == .server {
                gnutls_certificate_server_set_request(
                    session, credentials.verifiesPeer ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_IGNORE)
            }
            return gnutls_credentials_set(
                session, GNUTLS_CRD_CERTIFICATE, UnsafeMutableRawPointer(pointer))
        case .serverKeys(let pointer, _):
            return gnutls_credentials_set(session, GNUTLS_CRD_PSK, UnsafeMutableRawPointer(pointer))
        case .clientKey(let pointer):
            return gnutls_credentials_set(session, GNUTLS_CRD_PSK, UnsafeMutableRawPointer(pointer))
        case .anonymousServer(let pointer):
            return gnutls_credentials_set(
                session, GNUTLS_CRD_ANON, UnsafeMutableRawPointer(pointer))
        case .anonymousClient(let pointer):
            return gnutls_credentials_set(
                session, GNUTLS_CRD_ANON, UnsafeMutableRawPointer(pointer))
        }
    }

    /// Has the handshake check the peer's chain, its purpose, and for a client its name.
    private func expectPeer(hostname: String?) {
        if let hostname, !hostname.isEmpty {
            // Tells a server of several names which one is meant; addresses are not sent.
            let isAddress = hostname.utf8.allSatisfy {
                ($0 >= 0x30 && $0 <= 0x39) || $0 == UInt8(ascii: ".") || $0 == UInt8(ascii: ":")
            }
            if !isAddress {
                gnutls_server_name_set(session, GNUTLS_NAME_DNS, hostname, hostname.utf8.count)
            }
        }
        guard credentials.verifiesPeer else { return }
        let purpose = credentials.endpoint == .server ? "1.3.6.1.5.5.7.3.2" : "1.3.6.1.5.5.7.3.1"
        var wanted = [(GNUTLS_DT_KEY_PURPOSE_OID, purpose)]
        if let hostname { wanted.append((GNUTLS_DT_DNS_HOSTNAME, hostname)) }
        let memory = UnsafeMutablePointer<gnutls_typed_vdata_st>.allocate(capacity: wanted.count)
        for (index, (type, text)) in wanted.enumerated() {
            let copy = strdup(text)
            if let copy { texts.append(copy) }
            let bytes = copy.map { UnsafeMutableRawPointer($0).assumingMemoryBound(to: UInt8.self) }
            (memory + index).initialize(to: gnutls_typed_vdata_st(type: type, data: bytes, size: 0))
        }
        expectations = memory
        gnutls_session_set_verify_cert2(session, memory, UInt32(wanted.count), 0)
    }

    // MARK: Ciphertext

    /// Takes ciphertext from the peer; the memory must not change until it is read.
    ///
    /// - Throws: `exhausted` when more than ``TLSLimits/inputBytesMax`` wait to be read.
    public func receive(_ ciphertext: IOSlice) throws(BlockError) {
        guard queues.inputCount + ciphertext.count <= TLSLimits.inputBytesMax else {
            throw BlockError(.exhausted, "too much TLS data waits to be read")
        }
        queues.append(ciphertext)
    }

    /// The peer's stream ended. A read then throws, unless the peer said goodbye before.
    public func receiveEnd() {
        queues.isEnded = true
    }

    /// What must be sent to the peer, in order; empty when there is nothing.
    public func takeCiphertext() -> IOVector {
        queues.takeOutput()
    }

    // MARK: Handshake

    /// Takes the handshake as far as the received bytes allow.
    ///
    /// - Throws: `permissionDenied` when the peer's credentials are not accepted, `protocolViolation`
    ///   otherwise. The session is of no use after that.
    public func handshake() throws(BlockError) -> Handshake {
        if let failure { throw failure }
        if isEstablished { return .done }
        while true {
            let result = gnutls_handshake(session)
            if result == 0 {
                isEstablished = true
                return .done
            }
            if result == GNUTLS_E_AGAIN || result == GNUTLS_E_INTERRUPTED {
                if queues.canPull { continue }
                return .needsInput
            }
            if gnutls_error_is_fatal(result) == 0 { continue }
            throw fail(result, "the TLS handshake failed")
        }
    }

    /// Who the peer is: its certificate's distinguished name, or the name of its key. `nil` when it
    /// showed neither.
    public var peerName: String? {
        switch credentials.kind {
        case .serverKeys:
            return gnutls_psk_server_get_username(session).map { String(cString: $0) }
        case .clientKey, .anonymousServer, .anonymousClient: return nil
        case .certificate: return certificateName()
        }
    }

    private func certificateName() -> String? {
        var count: UInt32 = 0
        guard let chain = gnutls_certificate_get_peers(session, &count), count > 0 else {
            return nil
        }
        var certificate: gnutls_x509_crt_t?
        guard gnutls_x509_crt_init(&certificate) == 0, let certificate else { return nil }
        defer { gnutls_x509_crt_deinit(certificate) }
        guard gnutls_x509_crt_import(certificate, chain, GNUTLS_X509_FMT_DER) == 0 else {
            return nil
        }
        var size = 1_024
        var text = [CChar](repeating: 0, count: size)
        guard gnutls_x509_crt_get_dn(certificate, &text, &size) == 0 else { return nil }
        return text.withUnsafeBufferPointer { $0.baseAddress.map { String(cString: $0) } }
    }

    // MARK: Plaintext

    /// Reads plaintext.
    ///
    /// - Parameter memory: not empty.
    /// - Throws: `disconnected` when the peer's stream was cut off without a goodbye,
    ///   `protocolViolation` when what came is not what the peer sent.
    public func read(into memory: UnsafeMutableRawBufferPointer) throws(BlockError) -> ReadResult {
        if let failure { throw failure }
        precondition(isEstablished && !memory.isEmpty)
        while true {
            let result = gnutls_record_recv(session, memory.baseAddress, memory.count)
            if result > 0 { return .bytes(result) }
            if result == 0 { return .closed }
            let code = Int32(truncatingIfNeeded: result)
            if code == GNUTLS_E_AGAIN || code == GNUTLS_E_INTERRUPTED {
                if queues.canPull { continue }
                return .needsInput
            }
            // A second handshake on the same connection has no use here, and a history of attacks.
            if code != GNUTLS_E_REHANDSHAKE, gnutls_error_is_fatal(code) == 0 { continue }
            throw fail(code, "the TLS connection broke")
        }
    }

    /// Encrypts all of `plaintext`; ``takeCiphertext()`` has it.
    public func write(_ plaintext: UnsafeRawBufferPointer) throws(BlockError) {
        if let failure { throw failure }
        precondition(isEstablished)
        var done = 0
        while done < plaintext.count {
            let rest = UnsafeRawBufferPointer(rebasing: plaintext[done...])
            let result = gnutls_record_send(session, rest.baseAddress, rest.count)
            if result >= 0 {
                done += result
                continue
            }
            let code = Int32(truncatingIfNeeded: result)
            if code == GNUTLS_E_INTERRUPTED { continue }
            throw fail(code, "cannot encrypt")
        }
    }

    /// Says goodbye: nothing is written after it.
    public func close() {
        guard isEstablished, failure == nil else { return }
        gnutls_bye(session, GNUTLS_SHUT_WR)
    }

    // MARK: Failures

    private func fail(_ result: Int32, _ what: String) -> BlockError {
        // Tells the peer why; when that does not work either, the connection's end has to do.
        gnutls_alert_send_appropriate(session, result)
        let error = queues.failure ?? explain(result, what)
        failure = error
        return error
    }

    private func explain(_ result: Int32, _ what: String) -> BlockError {
        let peer = credentials.endpoint == .server ? "client" : "server"
        switch result {
        case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
            return BlockError(
                .permissionDenied,
                "the \(peer)'s certificate is not accepted: \(verificationStatus())",
                remedy: "check ca-cert.pem, the certificate's dates and names, and tls-hostname")
        case GNUTLS_E_NO_CERTIFICATE_FOUND, GNUTLS_E_CERTIFICATE_REQUIRED:
            return BlockError(
                .permissionDenied, "the \(peer) showed no certificate",
                remedy: "give it \(peer)-cert.pem and \(peer)-key.pem, or turn verify-peer off")
        case GNUTLS_E_FATAL_ALERT_RECEIVED, GNUTLS_E_WARNING_ALERT_RECEIVED:
            let alert = gnutls_alert_get_name(gnutls_alert_get(session))
            let name = alert.map { String(cString: $0) } ?? "no reason"
            return BlockError(.permissionDenied, "\(what): the \(peer) refused (\(name))")
        case GNUTLS_E_PREMATURE_TERMINATION, GNUTLS_E_PULL_ERROR:
            return BlockError(
                .disconnected, "\(what): the \(peer) closed the connection without TLS's goodbye")
        case GNUTLS_E_UNEXPECTED_PACKET_LENGTH where queues.isEnded:
            return BlockError(
                .disconnected, "\(what): the \(peer) closed the connection without TLS's goodbye")
        case GNUTLS_E_REHANDSHAKE:
            return BlockError(.protocolViolation, "the \(peer) asked for a second TLS handshake")
        case GNUTLS_E_DECRYPTION_FAILED where !isEstablished:
            return BlockError(.permissionDenied, "\(what): the \(peer)'s key is another one")
        default:
            return BlockError(
                .protocolViolation, "\(what): \(TLSCredentials.describe(result))")
        }
    }

    private func verificationStatus() -> String {
        TLSCredentials.describe(
            verification: gnutls_session_get_verify_cert_status(session))
    }

    /// Finds a user's key for GnuTLS, in the memory that it frees itself.
    static func findKey(
        _ session: gnutls_session_t?, _ username: UnsafePointer<CChar>?,
        _ key: UnsafeMutablePointer<gnutls_datum_t>?
    ) -> Int32 {
        guard let pointer = gnutls_session_get_ptr(session), let username, let key else {
            return -1
        }
        let owner = Unmanaged<TLSSession>.fromOpaque(pointer).takeUnretainedValue()
        guard case .serverKeys(_, let keys) = owner.credentials.kind,
            let name = String(validatingCString: username), let found = keys[name]
        else { return -1 }
        guard let memory = malloc(found.count) else { return -1 }
        UnsafeMutableRawBufferPointer(start: memory, count: found.count).copyBytes(from: found)
        key.pointee.data = memory.assumingMemoryBound(to: UInt8.self)
        key.pointee.size = UInt32(found.count)
        return 0
    }
}
