import BlockCore
import CLibcrypto

/// The library that the algorithms come from: OpenSSL's libcrypto, loaded when it is first needed.
public enum CryptoLibrary {
    /// Makes the library ready; every initialiser and function here that needs it calls this.
    ///
    /// - Throws: `unsupported`, with the package to install, where the library is not there.
    public static func load() throws(BlockError) {
        guard let failure = merino_crypto_load() else { return }
        throw BlockError(
            .unsupported, "encryption is not available: \(String(cString: failure))",
            remedy: "install OpenSSL's libcrypto 3 (Debian: libssl3)")
    }

    /// `count` bytes that nobody can guess.
    public static func randomBytes(_ count: Int) -> [UInt8] {
        var generator = SystemRandomNumberGenerator()
        return (0..<count).map { _ in UInt8.random(in: .min ... .max, using: &generator) }
    }
}

extension SecretBytes {
    /// As many random bytes.
    public static func random(count: Int) -> SecretBytes {
        SecretBytes(CryptoLibrary.randomBytes(count))
    }
}
