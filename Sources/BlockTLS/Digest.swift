import BlockCore
import CGnuTLS

/// Checksums by GnuTLS.
public enum Digest {
    /// The SHA-256 checksum of `bytes`, in hexadecimal digits.
    ///
    /// - Throws: `unsupported` when GnuTLS cannot be loaded.
    public static func sha256(_ bytes: [UInt8]) throws(BlockError) -> String {
        if let reason = merino_gnutls_load() {
            throw BlockError(
                .unsupported, "GnuTLS cannot be loaded: \(String(cString: reason))",
                remedy: "install libgnutls30")
        }
        var digest = [UInt8](repeating: 0, count: 32)
        let status = gnutls_hash_fast(GNUTLS_DIG_SHA256, bytes, bytes.count, &digest)
        guard status == 0 else {
            throw BlockError(
                .unsupported, "GnuTLS makes no SHA-256: \(String(cString: gnutls_strerror(status)))"
            )
        }
        return digest.map { byte in
            String(byte >> 4, radix: 16) + String(byte & 15, radix: 16)
        }.joined()
    }
}
