import BlockCore
import CGnuTLS

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Looking at certificates as a peer will.
extension TLSCredentials {
    /// Checks the certificate that one side shows against the authorities that it trusts: dates, issuer,
    /// revocation, and that it is meant for this side (RFC 5280, 4.2.1.12). One side without a certificate
    /// has nothing to be checked.
    ///
    /// - Parameter hasAuthority: otherwise nobody can tell who issued it, and the rest is checked.
    /// - Throws: `invalidArgument` that names the file and says what is wrong.
    static func verifyIdentity(
        in credentials: gnutls_certificate_credentials_t, _ endpoint: TLSEndpoint, path: String,
        hasAuthority: Bool
    ) throws(BlockError) {
        var chain: UnsafeMutablePointer<gnutls_x509_crt_t?>?
        var count: UInt32 = 0
        guard gnutls_certificate_get_x509_crt(credentials, 0, &chain, &count) >= 0, let chain else {
            return
        }
        defer {
            for index in 0..<Int(count) { gnutls_x509_crt_deinit(chain[index]) }
            free(chain)
        }
        var trust: gnutls_x509_trust_list_t?
        gnutls_certificate_get_trust_list(credentials, &trust)
        var status: UInt32 = 0
        // What GNUTLS_KP_TLS_WWW_SERVER and _CLIENT stand for.
        var purpose = Array(
            (endpoint == .server ? "1.3.6.1.5.5.7.3.1" : "1.3.6.1.5.5.7.3.2").utf8CString)
        let result = purpose.withUnsafeMutableBytes { text in
            var data = gnutls_typed_vdata_st(
                type: GNUTLS_DT_KEY_PURPOSE_OID,
                data: text.baseAddress?.assumingMemoryBound(to: UInt8.self), size: 0)
            return gnutls_x509_trust_list_verify_crt2(
                trust, chain, count, &data, 1, 0, &status, nil)
        }
        guard result >= 0 else {
            throw BlockError(
                .invalidArgument, "cannot check the certificate '\(path)': \(describe(result))")
        }
        if !hasAuthority {
            status &= ~UInt32(GNUTLS_CERT_SIGNER_NOT_FOUND.rawValue)
            // It says that there is anything else, and nothing by itself.
            if status == UInt32(GNUTLS_CERT_INVALID.rawValue) { status = 0 }
        }
        guard status == 0 else {
            throw BlockError(
                .invalidArgument,
                "peers would not accept the certificate '\(path)': "
                    + describe(verification: status),
                remedy: "renew it, or use it as it is with sanity-check=off")
        }
    }

    /// GnuTLS's words for what became of a verification.
    static func describe(verification status: UInt32) -> String {
        var text = gnutls_datum_t()
        let result = gnutls_certificate_verification_status_print(
            status, GNUTLS_CRT_X509, &text, 0)
        guard result == 0, let data = text.data else { return "status \(status)" }
        defer { free(data) }
        let bytes = UnsafeBufferPointer(start: data, count: Int(text.size))
        var words = String(decoding: bytes, as: UTF8.self)
        while let last = words.last, last == " " || last == "." || last == "\0" {
            words.removeLast()
        }
        return words
    }
}
