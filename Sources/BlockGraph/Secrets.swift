import BlockCore
import BlockIO
import QMP

/// A passphrase or a key, which options of drivers name as `key-secret`.
public final class GraphSecret: GraphObject {
    /// The longest that is read from a file or from options.
    public static let bytesMax = 2 << 20

    public let bytes: SecretBytes

    public init(_ bytes: SecretBytes) {
        self.bytes = bytes
    }

    /// Whoever opened an image with it has what it needs.
    public var users: [String] { [] }

    /// Reads `data` or `file`, and `format`, as object `secret` has them; reads no other option.
    ///
    /// On the thread of the graph.
    public static func read(
        _ options: OptionReader, on thread: IOThread
    ) async throws(BlockError) -> GraphSecret {
        let data = try options.string("data")
        let file = try options.string("file")
        let format = try options.string("format") ?? "raw"
        let encryption = [try options.string("keyid"), try options.string("iv")]
        guard encryption == [nil, nil] else {
            throw BlockError(
                .unsupported, "\(options.subject): encrypted secrets are not supported",
                remedy: "protect the file by its permissions")
        }
        var bytes: [UInt8]
        switch (data, file) {
        case (let data?, nil): bytes = Array(data.utf8)
        case (nil, let file?):
            bytes = try await thread.offload { () throws(BlockError) in
                try SmallFile.read(file, bytesMax: bytesMax)
            }
        default:
            throw BlockError(
                .invalidArgument, "\(options.subject): give either 'data' or 'file'")
        }
        switch format {
        case "raw": return GraphSecret(SecretBytes(taking: &bytes))
        case "base64":
            let text = SecretBytes(taking: &bytes)
            guard var decoded = Base64.decode(text.array) else {
                throw BlockError(.invalidArgument, "\(options.subject): it is not valid base64")
            }
            return GraphSecret(SecretBytes(taking: &decoded))
        default:
            throw BlockError(
                .invalidArgument, "\(options.subject): 'format' does not accept '\(format)'",
                remedy: "use raw or base64")
        }
    }
}

extension BlockGraph {
    /// The bytes of the secret that an option names.
    ///
    /// - Throws: `notFound`.
    public func secret(named name: String) throws(BlockError) -> SecretBytes {
        guard let secret = objects[name] as? GraphSecret else {
            throw BlockError(
                .notFound, "there is no secret '\(name)'",
                remedy: "add one: --object secret,id=\(name),file=…, or object-add")
        }
        return secret.bytes
    }
}
