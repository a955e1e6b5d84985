import BlockCore

/// Reads an object of options, typed; what nobody read is an error at the end.
///
/// Values come from JSON, where they have types, or from `key=value` text, where all are strings: a
/// string that spells the wanted type is taken too. Confined to whoever reads.
public final class OptionReader {
    /// Whose options these are, for errors: `"driver 'qcow2'"`.
    public var subject: String
    private let object: JSONObject
    private let prefix: String
    private var asked: [String] = []
    private var taken: Set<String> = []

    /// - Throws: `invalidArgument` when `value` is no object.
    public init(_ value: JSONValue, of subject: String) throws(BlockError) {
        guard case .object(let object) = value else {
            throw BlockError(
                .invalidArgument, "the options of \(subject) must be an object, not \(value.kind)")
        }
        self.object = object
        self.subject = subject
        prefix = ""
    }

    private init(_ object: JSONObject, of subject: String, prefix: String) {
        self.object = object
        self.subject = subject
        self.prefix = prefix
    }

    // MARK: Values

    /// The value of `key` as it stands, or `nil`.
    public func value(_ key: String) throws(BlockError) -> JSONValue? {
        asked.append(key)
        taken.insert(key)
        return object[key]
    }

    public func string(_ key: String) throws(BlockError) -> String? {
        switch try value(key) {
        case nil: return nil
        case .string(let text): return text
        case .some(let other): throw wrongType(key, "a string", other)
        }
    }

    public func bool(_ key: String) throws(BlockError) -> Bool? {
        switch try value(key) {
        case nil: return nil
        case .bool(let value): return value
        case .string("on"), .string("yes"), .string("true"): return true
        case .string("off"), .string("no"), .string("false"): return false
        case .some(let other): throw wrongType(key, "a boolean (on or off)", other)
        }
    }

    public func int(_ key: String) throws(BlockError) -> Int? {
        switch try value(key) {
        case nil: return nil
        case .integer(let value): return value
        case .string(let text):
            if text.hasPrefix("0x"), let value = Int(text.dropFirst(2), radix: 16) { return value }
            if let value = Int(text) { return value }
            throw wrongType(key, "an integer", .string(text))
        case .unsigned(let value)?:
            throw BlockError(
                .invalidArgument, "\(subject): '\(prefix)\(key)' is out of bounds: \(value)",
                remedy: "the largest is \(Int.max)")
        case .some(let other): throw wrongType(key, "an integer", other)
        }
    }

    /// Bytes: a number, or text with a unit (`64k`, `10G`).
    public func size(_ key: String) throws(BlockError) -> Int? {
        switch try value(key) {
        case nil: return nil
        case .integer(let value) where value >= 0: return value
        case .string(let text):
            if let value = SizeText.parse(text) { return value }
            throw wrongType(key, "a size, as in 64k or 10G", .string(text))
        case .some(let other): throw wrongType(key, "a size", other)
        }
    }

    public func enumeration<T>(
        _ key: String, as type: T.Type
    ) throws(BlockError) -> T? where T: RawRepresentable & CaseIterable, T.RawValue == String {
        guard let text = try string(key) else { return nil }
        guard let value = T(rawValue: text) else {
            let choices = T.allCases.map(\.rawValue).joined(separator: ", ")
            throw BlockError(
                .invalidArgument, "\(subject): option '\(prefix)\(key)' does not accept '\(text)'",
                remedy: "use one of \(choices)")
        }
        return value
    }

    /// The options in the object at `key`.
    public func object(_ key: String) throws(BlockError) -> OptionReader? {
        switch try value(key) {
        case nil: return nil
        case .object(let object):
            return OptionReader(object, of: subject, prefix: "\(prefix)\(key).")
        case .some(let other): throw wrongType(key, "an object", other)
        }
    }

    public func list(_ key: String) throws(BlockError) -> [JSONValue]? {
        switch try value(key) {
        case nil: return nil
        case .array(let values): return values
        case .some(let other): throw wrongType(key, "a list", other)
        }
    }

    // MARK: End

    /// - Throws: `invalidArgument` for an option that nobody read, with the nearest one there is.
    public func finish() throws(BlockError) {
        guard let unknown = object.members.first(where: { !taken.contains($0.key) }) else { return }
        let near = Self.nearest(to: unknown.key, in: asked)
        throw BlockError(
            .invalidArgument, "\(subject): there is no option '\(prefix)\(unknown.key)'",
            remedy: near.map { "did you mean '\(prefix)\($0)'?" })
    }

    private func wrongType(_ key: String, _ wanted: String, _ value: JSONValue) -> BlockError {
        var given = value.kind
        if case .string(let text) = value { given = "'\(text)'" }
        return BlockError(
            .invalidArgument, "\(subject): option '\(prefix)\(key)' expects \(wanted), not \(given)"
        )
    }

    /// The candidate with the smallest edit distance, if it is a plausible slip.
    public static func nearest(to key: String, in candidates: [String]) -> String? {
        let limit = max(1, key.utf8.count / 3)
        var best: (String, Int)?
        for candidate in candidates {
            let distance = editDistance(
                Array(key.utf8.prefix(64)), Array(candidate.utf8.prefix(64)))
            if distance <= limit, distance < best?.1 ?? .max { best = (candidate, distance) }
        }
        return best?.0
    }

    private static func editDistance(_ left: [UInt8], _ right: [UInt8]) -> Int {
        var row = Array(0...right.count)
        for (index, byte) in left.enumerated() {
            var diagonal = row[0]
            row[0] = index + 1
            for (column, other) in right.enumerated() {
                let above = row[column + 1]
                row[column + 1] = min(
                    above + 1, row[column] + 1, diagonal + (byte == other ? 0 : 1))
                diagonal = above
            }
        }
        return row[right.count]
    }
}
