import BlockCore
import CGnuTLS

extension TLSCredentials {
    /// No credentials at all: what is sent is encrypted, but nobody knows to whom. It keeps out who
    /// listens, not who gets in between.
    ///
    /// Such key exchanges ended with TLS 1.2.
    ///
    /// - Parameter priority: GnuTLS priority string; the anonymous exchanges are added to it.
    /// - Throws: `invalidArgument` for a priority string that GnuTLS does not take.
    public static func anonymous(
        endpoint: TLSEndpoint, priority: String = defaultPriority
    ) throws(BlockError) -> TLSCredentials {
        let ciphers = try makePriority("\(priority):-VERS-TLS1.3:+ANON-ECDH:+ANON-DH")
        guard let kind = makeAnonymous(endpoint) else {
            gnutls_priority_deinit(ciphers)
            throw BlockError(.exhausted, "no memory for TLS credentials")
        }
        return TLSCredentials(kind, endpoint, verifiesPeer: false, priority: ciphers)
    }

    private static func makeAnonymous(_ endpoint: TLSEndpoint) -> Kind? {
        switch endpoint {
        case .server:
            var pointer: gnutls_anon_server_credentials_t?
            guard gnutls_anon_allocate_server_credentials(&pointer) == 0, let pointer else {
                return nil
            }
            // For clients without elliptic curves: the parameters of RFC 7919.
            gnutls_anon_set_server_known_dh_params(pointer, GNUTLS_SEC_PARAM_MEDIUM)
            return .anonymousServer(pointer)
        case .client:
            var pointer: gnutls_anon_client_credentials_t?
            guard gnutls_anon_allocate_client_credentials(&pointer) == 0, let pointer else {
                return nil
            }
            return .anonymousClient(pointer)
        }
    }
}
