import BlockCore
import CGnuTLS

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Which side of a connection.
public enum TLSEndpoint: String, Sendable, CaseIterable {
    case server
    case client
}

/// What one side shows, and what it trusts. Read from files once, immutable after; any number of
/// sessions on any threads may share it.
///
/// The directories are laid out as QEMU's `tls-creds-x509` and `tls-creds-psk` objects have them.
public final class TLSCredentials: @unchecked Sendable {
    // GnuTLS lets sessions share credentials that nobody changes: that is why this is Sendable.

    enum Kind {
        case certificate(gnutls_certificate_credentials_t, parameters: gnutls_dh_params_t?)
        case serverKeys(gnutls_psk_server_credentials_t, [String: [UInt8]])
        case clientKey(gnutls_psk_client_credentials_t)
        case anonymousServer(gnutls_anon_server_credentials_t)
        case anonymousClient(gnutls_anon_client_credentials_t)
    }

    public let endpoint: TLSEndpoint
    /// Whether the peer's certificate is checked. Keys shared in advance are always checked.
    public let verifiesPeer: Bool
    let kind: Kind
    let priority: gnutls_priority_t

    init(
        _ kind: Kind, _ endpoint: TLSEndpoint, verifiesPeer: Bool, priority: gnutls_priority_t
    ) {
        self.kind = kind
        self.endpoint = endpoint
        self.verifiesPeer = verifiesPeer
        self.priority = priority
    }

    /// Whether the peer's certificate has to be for the name that was connected to: whoever uses them
    /// has to know that name.
    public var checksName: Bool {
        if case .certificate = kind { return verifiesPeer && endpoint == .client }
        return false
    }

    deinit {
        switch kind {
        case .certificate(let credentials, let parameters):
            gnutls_certificate_free_credentials(credentials)
            if let parameters { gnutls_dh_params_deinit(parameters) }
        case .serverKeys(let credentials, _): gnutls_psk_free_server_credentials(credentials)
        case .clientKey(let credentials): gnutls_psk_free_client_credentials(credentials)
        case .anonymousServer(let credentials): gnutls_anon_free_server_credentials(credentials)
        case .anonymousClient(let credentials): gnutls_anon_free_client_credentials(credentials)
        }
        gnutls_priority_deinit(priority)
    }

    /// The ciphers offered when the user names none.
    public static let defaultPriority = "NORMAL"

    // MARK: Certificates

    /// Certificates from a directory: `ca-cert.pem`, `server-cert.pem` and `server-key.pem` or
    /// `client-cert.pem` and `client-key.pem`, and where they exist `ca-crl.pem` and `dh-params.pem`.
    /// A client needs no certificate of its own unless its server asks for one.
    ///
    /// - Parameters:
    ///   - verifiesPeer: a client checks its server's certificate and name, a server asks its clients
    ///     for a certificate and checks it.
    ///   - priority: GnuTLS priority string; versions below TLS 1.2 are always off.
    ///   - keyPassword: for an encrypted private key.
    ///   - verifiesIdentity: checks this side's own certificate as peers will.
    /// - Throws: `notFound`, `permissionDenied`, `invalidArgument`, naming the file.
    public static func x509(
        directory: String, endpoint: TLSEndpoint, verifiesPeer: Bool = true,
        priority: String = defaultPriority, keyPassword: String? = nil,
        verifiesIdentity: Bool = true
    ) throws(BlockError) -> TLSCredentials {
        let ciphers = try makePriority(priority)
        var pointer: gnutls_certificate_credentials_t?
        guard gnutls_certificate_allocate_credentials(&pointer) == 0, let pointer else {
            gnutls_priority_deinit(ciphers)
            throw BlockError(.exhausted, "no memory for TLS credentials")
        }
        let parameters: gnutls_dh_params_t?
        do throws(BlockError) {
            let hasAuthority = try loadTrust(
                directory, verifiesPeer || endpoint == .client, into: pointer)
            try loadIdentity(directory, endpoint, keyPassword, into: pointer)
            if verifiesIdentity {
                try verifyIdentity(
                    in: pointer, endpoint, path: "\(directory)/\(endpoint.rawValue)-cert.pem",
                    hasAuthority: hasAuthority)
            }
            parameters = try loadParameters(directory, into: pointer)
        } catch {
            gnutls_certificate_free_credentials(pointer)
            gnutls_priority_deinit(ciphers)
            throw error
        }
        return TLSCredentials(
            .certificate(pointer, parameters: parameters), endpoint, verifiesPeer: verifiesPeer,
            priority: ciphers)
    }

    /// - Returns: whether there are authorities to trust.
    private static func loadTrust(
        _ directory: String, _ isNeeded: Bool,
        into credentials: gnutls_certificate_credentials_t
    ) throws(BlockError) -> Bool {
        let authority = "\(directory)/ca-cert.pem"
        let hasAuthority = try isReadable(authority, isNeeded: isNeeded)
        if hasAuthority {
            let count = gnutls_certificate_set_x509_trust_file(
                credentials, authority, GNUTLS_X509_FMT_PEM)
            guard count > 0 else { throw unusable(authority, count) }
        }
        let revoked = "\(directory)/ca-crl.pem"
        if try isReadable(revoked, isNeeded: false) {
            let count = gnutls_certificate_set_x509_crl_file(
                credentials, revoked, GNUTLS_X509_FMT_PEM)
            guard count >= 0 else { throw unusable(revoked, count) }
        }
        return hasAuthority
    }

    private static func loadIdentity(
        _ directory: String, _ endpoint: TLSEndpoint, _ password: String?,
        into credentials: gnutls_certificate_credentials_t
    ) throws(BlockError) {
        let certificate = "\(directory)/\(endpoint.rawValue)-cert.pem"
        let key = "\(directory)/\(endpoint.rawValue)-key.pem"
        let isNeeded = endpoint == .server
        guard try isReadable(certificate, isNeeded: isNeeded) else { return }
        _ = try isReadable(key, isNeeded: true)
        let result = gnutls_certificate_set_x509_key_file2(
            credentials, certificate, key, GNUTLS_X509_FMT_PEM, password, 0)
        guard result >= 0 else { throw unusable("\(certificate)' with '\(key)", result) }
    }

    private static func loadParameters(
        _ directory: String, into credentials: gnutls_certificate_credentials_t
    ) throws(BlockError) -> gnutls_dh_params_t? {
        let path = "\(directory)/dh-params.pem"
        guard try isReadable(path, isNeeded: false) else { return nil }
        var text = try readFile(path)
        var parameters: gnutls_dh_params_t?
        guard gnutls_dh_params_init(&parameters) == 0, let parameters else {
            throw BlockError(.exhausted, "no memory for TLS credentials")
        }
        let result = text.withUnsafeMutableBufferPointer { bytes in
            var datum = gnutls_datum_t(data: bytes.baseAddress, size: UInt32(bytes.count))
            return gnutls_dh_params_import_pkcs3(parameters, &datum, GNUTLS_X509_FMT_PEM)
        }
        guard result >= 0 else {
            gnutls_dh_params_deinit(parameters)
            throw unusable(path, result)
        }
        gnutls_certificate_set_dh_params(credentials, parameters)
        return parameters
    }

    // MARK: Keys shared in advance

    /// Keys from `keys.psk` in a directory: lines of `username:hexkey`.
    ///
    /// - Parameters:
    ///   - username: whose key a client shows; a server takes every user of the file.
    ///   - priority: GnuTLS priority string; the exchanges of shared keys are added to it.
    /// - Throws: `notFound`, `permissionDenied`, `invalidArgument`, naming the file.
    public static func psk(
        directory: String, endpoint: TLSEndpoint, username: String = "qemu",
        priority: String = defaultPriority
    ) throws(BlockError) -> TLSCredentials {
        let path = "\(directory)/keys.psk"
        _ = try isReadable(path, isNeeded: true)
        let keys = try SharedKeys.parse(try readFile(path), path: path)
        let ciphers = try makePriority("\(priority):+ECDHE-PSK:+DHE-PSK:+PSK")
        do throws(BlockError) {
            let kind = try makeKeys(keys, endpoint, username, path)
            return TLSCredentials(kind, endpoint, verifiesPeer: true, priority: ciphers)
        } catch {
            gnutls_priority_deinit(ciphers)
            throw error
        }
    }

    private static func makeKeys(
        _ keys: [String: [UInt8]], _ endpoint: TLSEndpoint, _ username: String, _ path: String
    ) throws(BlockError) -> Kind {
        switch endpoint {
        case .server:
            var pointer: gnutls_psk_server_credentials_t?
            guard gnutls_psk_allocate_server_credentials(&pointer) == 0, let pointer else {
                throw BlockError(.exhausted, "no memory for TLS credentials")
            }
            gnutls_psk_set_server_credentials_function(pointer) { session, username, key in
                TLSSession.findKey(session, username, key)
            }
            return .serverKeys(pointer, keys)
        case .client:
            guard var key = keys[username] else {
                throw BlockError(
                    .notFound, "'\(path)' has no key for the user '\(username)'",
                    remedy: "add a line '\(username):' with the key in hexadecimal")
            }
            var pointer: gnutls_psk_client_credentials_t?
            guard gnutls_psk_allocate_client_credentials(&pointer) == 0, let pointer else {
                throw BlockError(.exhausted, "no memory for TLS credentials")
            }
            let result = key.withUnsafeMutableBufferPointer { bytes in
                var datum = gnutls_datum_t(data: bytes.baseAddress, size: UInt32(bytes.count))
                return gnutls_psk_set_client_credentials(
                    pointer, username, &datum, GNUTLS_PSK_KEY_RAW)
            }
            guard result >= 0 else {
                gnutls_psk_free_client_credentials(pointer)
                throw unusable(path, result)
            }
            return .clientKey(pointer)
        }
    }

    // MARK: Shared

    /// - Throws: `invalidArgument` for a priority string that GnuTLS does not take.
    public static func check(priority: String) throws(BlockError) {
        gnutls_priority_deinit(try makePriority(priority))
    }

    /// Every kind of credentials begins here, and so does the loading of GnuTLS.
    static func makePriority(_ text: String) throws(BlockError) -> gnutls_priority_t {
        if let reason = merino_gnutls_load() {
            throw BlockError(
                .unsupported, "TLS needs GnuTLS: \(String(cString: reason))",
                remedy: "install Debian's libgnutls30")
        }
        var pointer: gnutls_priority_t?
        let whole = text + ":-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1"
        let result = gnutls_priority_init(&pointer, whole, nil)
        guard result == 0, let pointer else {
            throw BlockError(
                .invalidArgument, "'\(text)' is no TLS priority string: \(describe(result))")
        }
        return pointer
    }

    /// Whether a file is there and may be read.
    private static func isReadable(
        _ path: String, isNeeded: Bool
    ) throws(BlockError) -> Bool {
        if access(path, R_OK) == 0 { return true }
        let systemError = errno
        if systemError == ENOENT, !isNeeded { return false }
        throw .system("cannot read '\(path)'", systemError)
    }

    private static func readFile(_ path: String) throws(BlockError) -> [UInt8] {
        guard let file = fopen(path, "re") else { throw .system("cannot open '\(path)'", errno) }
        defer { fclose(file) }
        let limit = TLSLimits.fileBytesMax
        let bytes = [UInt8](unsafeUninitializedCapacity: limit + 1) { buffer, count in
            count = fread(buffer.baseAddress, 1, limit + 1, file)
        }
        guard ferror(file) == 0 else {
            throw BlockError(.inputOutput, "cannot read '\(path)'")
        }
        guard bytes.count <= limit else {
            throw BlockError(.exhausted, "'\(path)' is larger than \(limit) bytes")
        }
        return bytes
    }

    private static func unusable(_ path: String, _ result: Int32) -> BlockError {
        let why = result == 0 ? "it holds nothing of the kind" : describe(result)
        return BlockError(.invalidArgument, "cannot use '\(path)': \(why)")
    }

    static func describe(_ result: Int32) -> String {
        gnutls_strerror(result).map { String(cString: $0) } ?? "TLS error \(result)"
    }
}

/// Bounds, in bytes unless the name says otherwise.
public enum TLSLimits {
    /// A key file or parameter file.
    public static let fileBytesMax = 1 << 20
    /// Ciphertext that was received and not yet read by a session.
    public static let inputBytesMax = 4 << 20
    /// A user's name in a key file.
    public static let usernameBytesMax = 1_024
    /// A key in a key file.
    public static let keyBytesMax = 1_024
}

/// The file of keys that were shared in advance.
enum SharedKeys {
    /// Parses lines of `username:hexkey`; empty lines and lines that begin with `#` say nothing.
    static func parse(_ bytes: [UInt8], path: String) throws(BlockError) -> [String: [UInt8]] {
        var result: [String: [UInt8]] = [:]
        let lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        for (index, line) in lines.enumerated() {
            let text = line.last == UInt8(ascii: "\r") ? line.dropLast() : line
            if text.isEmpty || text.first == UInt8(ascii: "#") { continue }
            guard let colon = text.firstIndex(of: UInt8(ascii: ":")), colon > text.startIndex,
                colon - text.startIndex <= TLSLimits.usernameBytesMax,
                let name = String(validating: text[..<colon], as: UTF8.self),
                let key = decode(text[(colon + 1)...])
            else {
                throw BlockError(
                    .invalidArgument, "line \(index + 1) of '\(path)' is not 'username:hexkey'")
            }
            result[name] = key
        }
        return result
    }

    private static func decode(_ text: ArraySlice<UInt8>) -> [UInt8]? {
        guard !text.isEmpty, text.count % 2 == 0, text.count / 2 <= TLSLimits.keyBytesMax else {
            return nil
        }
        var result: [UInt8] = []
        var rest = text
        while let high = rest.popFirst(), let low = rest.popFirst() {
            guard let upper = digit(high), let lower = digit(low) else { return nil }
            result.append(upper << 4 | lower)
        }
        return result
    }

    private static func digit(_ character: UInt8) -> UInt8? {
        switch character {
        case UInt8(ascii: "0")...UInt8(ascii: "9"): character - UInt8(ascii: "0")
        case UInt8(ascii: "a")...UInt8(ascii: "f"): character - UInt8(ascii: "a") + 10
        case UInt8(ascii: "A")...UInt8(ascii: "F"): character - UInt8(ascii: "A") + 10
        default: nil
        }
    }
}
