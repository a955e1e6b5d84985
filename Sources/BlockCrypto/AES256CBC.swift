import BlockCore
import CLibcrypto

/// AES with keys of 256 bits, in cipher block chaining, padded as PKCS #7 says (RFC 5652 §6.3): what
/// secrets are encrypted with.
public enum AES256CBC {
    public static let keyBytes = 32
    public static let blockBytes = 16

    /// - Parameters:
    ///   - ciphertext: whole blocks, at least one.
    ///   - key: ``keyBytes`` of it.
    ///   - vector: the initialisation vector, ``blockBytes`` of it.
    /// - Throws: `invalidArgument` for other lengths, and when the padding shows that the key is wrong.
    public static func decrypt(
        _ ciphertext: [UInt8], key: [UInt8], vector: [UInt8]
    ) throws(BlockError) -> [UInt8] {
        guard key.count == keyBytes else {
            throw BlockError(
                .invalidArgument, "the key has \(key.count) bytes, it must have \(keyBytes)")
        }
        guard vector.count == blockBytes else {
            throw BlockError(
                .invalidArgument,
                "the initialisation vector has \(vector.count) bytes, it must have \(blockBytes)")
        }
        guard !ciphertext.isEmpty, ciphertext.count % blockBytes == 0 else {
            throw BlockError(
                .invalidArgument, "the ciphertext is no whole number of \(blockBytes)-byte blocks")
        }
        let plaintext = try decryptBlocks(ciphertext, key, vector)
        guard let padding = plaintext.last.map(Int.init), padding >= 1, padding <= blockBytes,
            plaintext.suffix(padding).allSatisfy({ $0 == UInt8(padding) })
        else {
            throw BlockError(
                .invalidArgument,
                "the key or the initialisation vector is not the one it was "
                    + "encrypted with")
        }
        return plaintext.dropLast(padding)
    }

    private static func decryptBlocks(
        _ ciphertext: [UInt8], _ key: [UInt8], _ vector: [UInt8]
    ) throws(BlockError) -> [UInt8] {
        try CryptoLibrary.load()
        guard let cipher = merino_cipher_new("AES-256-CBC", key, key.count, 0) else {
            throw BlockError(.unsupported, "the crypto library has no AES-256-CBC")
        }
        defer { merino_cipher_free(cipher) }
        var plaintext = [UInt8](repeating: 0, count: ciphertext.count)
        guard merino_cipher_run(cipher, vector, ciphertext, &plaintext, ciphertext.count) == 0
        else {
            throw BlockError(.inputOutput, "the crypto library failed to decrypt")
        }
        return plaintext
    }
}
