import BlockCore

// Option lists of command lines: `cluster_size=4k,lazy_refcounts`, as `-o` takes them.

extension CreationOption {
    /// Reads a list. Two commas stand for one; an option without a value is switched on, one with `no` in
    /// front of its name off. Dots are part of these names (`encrypt.format`), not levels.
    ///
    /// - Throws: `invalidArgument` for a list with nothing before or behind a comma, and for options
    ///   that are not among `known`.
    static func read(
        _ text: String, _ known: [CreationOption], _ format: String
    ) throws(BlockError) -> [(option: CreationOption, value: String)] {
        var result: [(option: CreationOption, value: String)] = []
        for part in try parts(of: text) {
            var key = part
            var value = "on"
            if let equals = part.firstIndex(of: "=") {
                key = String(part[..<equals])
                value = String(part[part.index(after: equals)...])
            } else if !known.contains(where: { $0.name == part }), part.hasPrefix("no") {
                key = String(part.dropFirst(2))
                value = "off"
            }
            guard let option = known.first(where: { $0.name == key }) else {
                throw BlockError(
                    .invalidArgument, "format '\(format)' has no such option '\(key)'",
                    remedy: "use one of " + known.map(\.name).joined(separator: ", "))
            }
            result.append((option, value))
        }
        return result
    }

    private static func parts(of text: String) throws(BlockError) -> [String] {
        var parts: [String] = [""]
        var rest = text[...]
        while let character = rest.popFirst() {
            guard character == "," else {
                parts[parts.count - 1].append(character)
                continue
            }
            if rest.first == "," {
                rest.removeFirst()
                parts[parts.count - 1].append(",")
            } else {
                parts.append("")
            }
        }
        guard !parts.contains("") else {
            throw BlockError(
                .invalidArgument, "an option is missing in the list '\(text)'",
                remedy: "write key=value,key=value")
        }
        return parts
    }
}
