import BlockCore

/// Names of images: what they stand for, and how one names another. The one place that knows.
///
/// ```
/// PATH, file:PATH        a file or a device; PATH is taken as it is behind file:
/// json:{…}               node options
/// blkdebug:… blkverify:… null-co:// null-aio://     nodes for tests
/// PROTOCOL:…             anything else with a ':' before its first '/': not known, and refused
/// ```
/// A file whose own name holds a colon is called `./a:b` or `file:a:b`.
public enum ImageName {
    enum Kind: Equatable {
        /// As a name that stands for that path and nothing else.
        case path(String)
        /// What follows `json:`.
        case json(String)
        case test
        case unknown(protocol: String)
    }

    static func kind(_ name: String) -> Kind {
        guard let scheme = scheme(of: name) else { return .path(name) }
        switch scheme {
        case "file":
            let path = String(name.dropFirst(5))
            return .path(hasProtocol(path) ? "./" + path : path)
        case "json": return .json(String(name.dropFirst(5)))
        case "blkdebug", "blkverify": return .test
        case "null-co" where name == "null-co://": return .test
        case "null-aio" where name == "null-aio://": return .test
        default: return .unknown(protocol: String(scheme))
        }
    }

    /// The path of an image that is to be made.
    ///
    /// - Throws: `unsupported` for names that are not a file's.
    static func newFile(_ name: String) throws(BlockError) -> String {
        guard case .path(let path) = kind(name) else {
            throw unknownProtocol(String(scheme(of: name) ?? ""), in: name)
        }
        return path
    }

    static func unknownProtocol(_ scheme: String, in name: String) -> BlockError {
        BlockError(
            .unsupported, "'\(name)': there is no protocol '\(scheme)'",
            remedy: "if it is a file's name, put './' in front")
    }

    /// The name of a backing image, as seen from where the command runs: a relative path is
    /// relative to the folder of the image that names it.
    ///
    /// - Parameters:
    ///   - name: what the image says.
    ///   - image: the name of the image that says it.
    public static func resolve(_ name: String, besides image: String) -> String {
        if name.hasPrefix("/") || hasProtocol(name) { return name }
        if case .json = kind(image) { return name }
        guard let slash = image.lastIndex(of: "/") else { return name }
        return String(image[...slash]) + name
    }

    /// Whether a name begins with `scheme:` before any slash.
    static func hasProtocol(_ name: String) -> Bool { scheme(of: name) != nil }

    private static func scheme(of name: String) -> Substring? {
        guard let colon = name.firstIndex(of: ":") else { return nil }
        let scheme = name[..<colon]
        return scheme.contains("/") ? nil : scheme
    }
}
