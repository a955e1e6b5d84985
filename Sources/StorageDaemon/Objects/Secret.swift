import BlockCore
import BlockGraph
import BlockIO
import BlockTLS
import QMP

#if os(Linux)
import CLinux
import Glibc
#endif

/// A secret's bytes, from where they are kept and out of what protects them there.
///
/// `format` says how the text spells bytes; with `keyid` they are encrypted by AES-256 in cipher block
/// chaining, under the key that another secret holds, with the initialisation vector `iv` (in base64).
struct Secret: Sendable {
    enum Format: String, Sendable, CaseIterable { case raw, base64 }

    private let format: Format
    private let key: SecretBytes?
    private let vector: [UInt8]?

    /// Reads the options that say how the secret is kept.
    ///
    /// - Parameter lookup: the bytes of another secret.
    init(
        _ reader: OptionReader, lookup: (String) throws(BlockError) -> SecretBytes
    ) throws(BlockError) {
        format = try reader.enumeration("format", as: Format.self) ?? .raw
        let keyIdentifier = try reader.string("keyid")
        let vectorText = try reader.string("iv")
        guard let keyIdentifier else {
            guard vectorText == nil else {
                throw BlockError(
                    .invalidArgument, "\(reader.subject): 'iv' is of no use without 'keyid'")
            }
            key = nil
            vector = nil
            return
        }
        guard let vectorText else {
            throw BlockError(
                .invalidArgument, "\(reader.subject): an encrypted secret needs 'iv'",
                remedy: "give the initialisation vector in base64")
        }
        guard let vector = Base64.decode(Array(vectorText.utf8)) else {
            throw BlockError(.invalidArgument, "\(reader.subject): 'iv' is not valid base64")
        }
        self.vector = vector
        key = try lookup(keyIdentifier)
    }

    /// The secret, from its text, which is taken over.
    func unwrap(_ text: inout [UInt8], of subject: String) throws(BlockError) -> SecretBytes {
        if format == .base64 {
            guard let decoded = Base64.decode(text) else {
                throw BlockError(.invalidArgument, "\(subject): it is not valid base64")
            }
            _ = SecretBytes(taking: &text)
            text = decoded
        }
        guard let key, let vector else { return SecretBytes(taking: &text) }
        do throws(BlockError) {
            var bytes = try AES256CBC.decrypt(text, key: key.array, vector: vector)
            return SecretBytes(taking: &bytes)
        } catch {
            throw BlockError(error.code, "\(subject): \(error.message)", remedy: error.remedy)
        }
    }

    /// The text of a key in the kernel's keyring.
    static func readKeyring(_ serial: Int) throws(BlockError) -> [UInt8] {
        #if os(Linux)
        guard let number = Int32(exactly: serial) else {
            throw BlockError(.invalidArgument, "no key has the serial number \(serial)")
        }
        // A key may be replaced by a longer one between the two calls.
        var bytes: [UInt8] = []
        while true {
            let count = linux_read_key(number, &bytes, bytes.count)
            guard count >= 0 else {
                throw .system("cannot read the key \(serial) of the kernel's keyring", errno)
            }
            guard count <= GraphSecret.bytesMax else {
                throw BlockError(.exhausted, "the key \(serial) is too long")
            }
            if count <= bytes.count { return Array(bytes.prefix(count)) }
            bytes = [UInt8](repeating: 0, count: count)
        }
        #else
        throw BlockError(.unsupported, "the kernel's keyring is Linux's")
        #endif
    }
}
