import BlockCore

/// Options as command lines give them: `driver=qcow2,file.driver=file,file.filename=a,,b`.
///
/// A dot goes a level deeper, a number names a place in a list, two commas stand for one. Values are
/// strings; ``OptionReader`` takes them for what they spell.
public enum KeyValue {
    /// Parses options, or JSON when the text begins with `{`.
    ///
    /// - Parameter impliedKey: what a first part without `=` is the value of.
    /// - Throws: `invalidArgument` saying which part is wrong.
    public static func parse(
        _ text: String, impliedKey: String? = nil
    ) throws(BlockError) -> JSONValue {
        if text.utf8.first == UInt8(ascii: "{") { return try JSONParser.parse(text) }
        var root = Tree.branch([])
        for (index, part) in parts(of: text).enumerated() {
            var key: Substring
            var value: Substring
            if let equals = part.firstIndex(of: "=") {
                key = part[..<equals]
                value = part[part.index(after: equals)...]
            } else if index == 0, let impliedKey, !part.isEmpty {
                key = impliedKey[...]
                value = part[...]
            } else {
                throw BlockError(
                    .invalidArgument, "expected 'key=value', not '\(part)', in '\(text)'")
            }
            let path = key.split(separator: ".", omittingEmptySubsequences: false).map(String.init)
            guard !path.contains(""), path.count <= Limits.jsonDepthMax else {
                throw BlockError(.invalidArgument, "'\(key)' is no option name, in '\(text)'")
            }
            try root.insert(String(value), at: path[...], in: String(key))
        }
        return try root.value(text)
    }

    /// Splits at single commas; two stand for one.
    private static func parts(of text: String) -> [String] {
        if text.isEmpty { return [] }
        var result = [""]
        var characters = text.unicodeScalars.makeIterator()
        var next = characters.next()
        while let character = next {
            next = characters.next()
            if character == "," {
                if next == "," {
                    result[result.count - 1] += ","
                    next = characters.next()
                } else {
                    result.append("")
                }
                continue
            }
            result[result.count - 1].unicodeScalars.append(character)
        }
        // A comma at the end separates nothing.
        if result.last == "" { result.removeLast() }
        return result
    }

    private indirect enum Tree {
        case leaf(String)
        case branch([(key: String, tree: Tree)])

        mutating func insert(
            _ text: String, at path: ArraySlice<String>, in key: String
        ) throws(BlockError) {
            guard case .branch(var members) = self, let first = path.first else {
                throw BlockError(
                    .invalidArgument, "option '\(key)' is given as a value and as a group")
            }
            let rest = path.dropFirst()
            let index = members.firstIndex { $0.key == first }
            if rest.isEmpty {
                if let index {
                    // The last one counts, as everywhere on command lines.
                    guard case .leaf = members[index].tree else {
                        throw BlockError(
                            .invalidArgument, "option '\(key)' is given as a value and as a group")
                    }
                    members[index].tree = .leaf(text)
                } else {
                    members.append((first, .leaf(text)))
                }
            } else {
                var child = index.map { members[$0].tree } ?? .branch([])
                try child.insert(text, at: rest, in: key)
                if let index { members[index].tree = child } else { members.append((first, child)) }
            }
            self = .branch(members)
        }

        func value(_ text: String) throws(BlockError) -> JSONValue {
            switch self {
            case .leaf(let leaf): return .string(leaf)
            case .branch(let members):
                let numbers = members.compactMap { Int($0.key) }
                guard !members.isEmpty, numbers.count == members.count else {
                    var object = JSONObject()
                    for member in members { object[member.key] = try member.tree.value(text) }
                    return .object(object)
                }
                guard numbers.sorted() == Array(0..<members.count) else {
                    throw BlockError(.invalidArgument, "a list has gaps, in '\(text)'")
                }
                var list = [JSONValue](repeating: .null, count: members.count)
                for (number, member) in zip(numbers, members) {
                    list[number] = try member.tree.value(text)
                }
                return .array(list)
            }
        }
    }
}
