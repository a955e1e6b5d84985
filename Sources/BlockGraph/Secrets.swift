import BlockCore
import BlockCrypto
import BlockIO
import QMP

/// A passphrase or a key, which options of drivers name as `key-secret`.
///
/// Where it comes from is its kind's: text of the options or a file (`secret`), or a key of the kernel
/// (`secret_keyring`). `format` says how that text spells bytes; with `keyid` they are encrypted by
/// AES-256 in cipher block chaining, under the key that another secret holds, with the initialisation
/// vector `iv` (in base64).
public final class GraphSecret: GraphObject {
    /// The longest that is read from a file or from options.
    public static let bytesMax = 2 << 20

    public let bytes: SecretBytes

    public init(_ bytes: SecretBytes) {
        self.bytes = bytes
    }

    /// Whoever opened an image with it has what it needs.
    public var users: [String] { [] }

    /// The types of objects that are secrets.
    public enum Kind: String, Sendable, CaseIterable {
        case plain = "secret"
        case keyring = "secret_keyring"
    }

    /// Makes a secret of the options of object `secret` or `secret_keyring`; no others may be left.
    ///
    /// On the thread of the graph, which has the secret that `keyid` names.
    public static func read(
        _ kind: Kind, _ options: OptionReader, in graph: BlockGraph
    ) async throws(BlockError) -> GraphSecret {
        let source = try Source(kind, options)
        let wrapping = try SecretWrapping(options, in: graph)
        try options.finish()
        var text = try await graph.thread.offload { () throws(BlockError) in try source.read() }
        return GraphSecret(try wrapping.unwrap(&text, of: options.subject))
    }

    /// Where the text is.
    private enum Source: Sendable {
        case text([UInt8])
        case file(String)
        case key(Int)

        init(_ kind: Kind, _ options: OptionReader) throws(BlockError) {
            switch kind {
            case .plain:
                switch (try options.string("data"), try options.string("file")) {
                case (let data?, nil): self = .text(Array(data.utf8))
                case (nil, let file?): self = .file(file)
                default:
                    throw BlockError(
                        .invalidArgument, "\(options.subject): give either 'data' or 'file'")
                }
            case .keyring:
                guard let serial = try options.int("serial") else {
                    throw BlockError(.invalidArgument, "\(options.subject): 'serial' is missing")
                }
                self = .key(serial)
            }
        }

        func read() throws(BlockError) -> [UInt8] {
            switch self {
            case .text(let bytes): bytes
            case .file(let path): try SmallFile.read(path, bytesMax: bytesMax)
            case .key(let serial): try KernelKeyring.read(serial, bytesMax: bytesMax)
            }
        }
    }
}

/// How the text of a secret stands for its bytes.
private struct SecretWrapping {
    enum Format: String, CaseIterable { case raw, base64 }

    private let format: Format
    private let encryption: (key: SecretBytes, vector: [UInt8])?

    init(_ reader: OptionReader, in graph: BlockGraph) throws(BlockError) {
        format = try reader.enumeration("format", as: Format.self) ?? .raw
        let keyIdentifier = try reader.string("keyid")
        let vectorText = try reader.string("iv")
        guard let keyIdentifier else {
            guard vectorText == nil else {
                throw BlockError(
                    .invalidArgument, "\(reader.subject): 'iv' is of no use without 'keyid'")
            }
            encryption = nil
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
        encryption = (try graph.secret(named: keyIdentifier), vector)
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
        guard let (key, vector) = encryption else { return SecretBytes(taking: &text) }
        do throws(BlockError) {
            var bytes = try AES256CBC.decrypt(text, key: key.array, vector: vector)
            return SecretBytes(taking: &bytes)
        } catch {
            throw BlockError(error.code, "\(subject): \(error.message)", remedy: error.remedy)
        }
    }
}

extension BlockGraph {
    /// The bytes of the secret that an option names.
    ///
    /// - Throws: `notFound`.
    public func secret(named name: String) throws(BlockError) -> SecretBytes {
        guard let secret = object(name) as? GraphSecret else {
            throw BlockError(
                .notFound, "there is no secret '\(name)'",
                remedy: "add one: --object secret,id=\(name),file=…, or object-add")
        }
        return secret.bytes
    }
}
