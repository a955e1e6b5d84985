import BlockCore

/// Turns option text of a command line into a JSON object with strings at its leaves.
///
/// `driver=qcow2,file.filename=a,,b,children.0=x`: dots nest, whole numbers between dots are places
/// in a list, `,,` stands for a comma in a value. Text that begins with `{` is JSON.
public struct KeyValue {
    /// - Parameters:
    ///   - impliedKey: the key of a first part that has none, as in `socket,id=x`.
    ///   - allowsFlags: a later part without `=` is switched on, or off where it begins with `no`.
    /// - Throws: `invalidArgument` for what is neither, an option that is a value and a group, gaps in a list.
    public static func parse(
        _ text: String, impliedKey: String? = nil, allowsFlags: Bool = false
    ) throws(BlockError) -> JSONValue {
        if text.first == "{" { return try JSONParser.parse(text) }
        guard text.utf8.count <= Limits.jsonBytesMax else {
            throw BlockError(.invalidArgument, "the options are too long")
        }
        guard !text.utf8.contains(0) else {
            throw BlockError(.invalidArgument, "options cannot hold a zero byte")
        }
        let root = OptionBranch()
        var valueCount = 0
        for (index, part) in parts(of: text).enumerated() {
            valueCount += 1
            guard valueCount <= Limits.jsonValueCountMax else {
                throw BlockError(.invalidArgument, "too many options")
            }
            let (key, value) = try split(
                part, impliedKey: index == 0 ? impliedKey : nil, allowsFlags: allowsFlags)
            try insert(value, at: key, of: root)
        }
        return try root.value()
    }

    /// That the options there are be told, instead of anything done.
    public struct HelpRequest: Sendable, Equatable {
        /// The value of the implied key, of which there may be more to tell.
        public let subject: String?
    }

    /// What `text` asks to be told, if a part of it is `help` or `?` and no more.
    ///
    /// - Parameter impliedKey: as for ``parse(_:impliedKey:allowsFlags:)``.
    public static func helpRequest(in text: String, impliedKey: String) -> HelpRequest? {
        if text.first == "{" { return nil }
        func asks(_ part: String) -> Bool { part == "help" || part == "?" }
        let parts = parts(of: text)
        guard parts.contains(where: asks) else { return nil }
        var subject: String?
        for (index, part) in parts.enumerated() where !asks(part) {
            if part.hasPrefix("\(impliedKey)=") {
                subject = String(part.dropFirst(impliedKey.count + 1))
            } else if index == 0, !part.contains("=") {
                subject = part
            }
        }
        return HelpRequest(subject: subject)
    }

    /// The parts between single commas, double ones made single.
    private static func parts(of text: String) -> [String] {
        var result: [String] = []
        var current: [UInt8] = []
        let bytes = Array(text.utf8)
        var index = 0
        while index < bytes.count {
            if bytes[index] == UInt8(ascii: ",") {
                if index + 1 < bytes.count, bytes[index + 1] == UInt8(ascii: ",") {
                    index += 1
                } else {
                    result.append(String(decoding: current, as: UTF8.self))
                    current = []
                    index += 1
                    continue
                }
            }
            current.append(bytes[index])
            index += 1
        }
        // A comma may end the text.
        if !current.isEmpty { result.append(String(decoding: current, as: UTF8.self)) }
        return result
    }

    private static func split(
        _ part: String, impliedKey: String?, allowsFlags: Bool
    ) throws(BlockError) -> (key: String, value: String) {
        if let equals = part.utf8.firstIndex(of: UInt8(ascii: "=")) {
            return (String(part[..<equals]), String(part[part.utf8.index(after: equals)...]))
        }
        if let impliedKey, !part.isEmpty { return (impliedKey, part) }
        guard !part.isEmpty else {
            throw BlockError(.invalidArgument, "an option is missing between two commas")
        }
        guard allowsFlags else {
            throw BlockError(
                .invalidArgument, "option '\(part)' has no value", remedy: "write \(part)=VALUE")
        }
        if part.hasPrefix("no"), part.utf8.count > 2 { return (String(part.dropFirst(2)), "off") }
        return (part, "on")
    }

    private static func insert(
        _ value: String, at path: String, of root: OptionBranch
    ) throws(BlockError) {
        let names = path.split(separator: ".", omittingEmptySubsequences: false)
        guard names.count <= Limits.jsonDepthMax else {
            throw BlockError(.invalidArgument, "option '\(path)' is nested too deep")
        }
        var branch = root
        for (level, name) in names.enumerated() {
            guard isName(name) else {
                throw BlockError(.invalidArgument, "'\(path)' is no name of an option")
            }
            guard branch.leaf == nil else { throw mixed(path) }
            if level > 0, isPlace(name) { branch.hasPlaces = true }
            branch = branch.member(String(name))
        }
        guard !branch.hasMembers else { throw mixed(path) }
        // The last one counts, as everywhere on command lines.
        branch.leaf = .string(value)
    }

    private static func mixed(_ path: String) -> BlockError {
        BlockError(
            .invalidArgument,
            "option '\(path)' and those nested in one of its parts exclude each other")
    }

    private static func isPlace(_ name: Substring) -> Bool {
        name.utf8.first.map { $0 >= 0x30 && $0 <= 0x39 } ?? false
    }

    /// A place in a list, or letters, digits, `-` and `_`.
    private static func isName(_ name: Substring) -> Bool {
        !name.isEmpty && name.utf8.count <= 127
            && name.utf8.allSatisfy { byte in
                switch byte {
                case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                    UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "_"):
                    true
                default: false
                }
            }
    }
}
