import BlockCore
import QMP

/// The configuration file of blkdebug: sections of rules, as QEMU's configuration files write them.
///
///     # comment
///     [inject-error]
///     event = "l2_update"
///     errno = "28"
enum DebugConfiguration {
    /// More than any test's rules take.
    static let fileBytesMax = 1 << 20

    /// - Throws: `invalidArgument`, naming the file and the line.
    static func parse(_ text: String, path: String) throws(BlockError) -> DebugRules {
        var rules = DebugRules()
        var section: (kind: String, options: JSONObject, line: Int)?
        for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false)
            .enumerated()
        {
            let words = trimmed(line)
            let place = "'\(path)', line \(index + 1)"
            if words.isEmpty || words.hasPrefix("#") { continue }
            if words.hasPrefix("[") {
                if let section { try add(section, to: &rules, path) }
                section = (try header(words, place), JSONObject(), index + 1)
                continue
            }
            let (key, value) = try assignment(words, place)
            guard section != nil else {
                throw BlockError(.invalidArgument, "\(place): '\(key)' stands before any section")
            }
            section?.options[key] = .string(value)
        }
        if let section { try add(section, to: &rules, path) }
        return rules
    }

    private static func add(
        _ section: (kind: String, options: JSONObject, line: Int), to rules: inout DebugRules,
        _ path: String
    ) throws(BlockError) {
        let reader = try OptionReader(
            .object(section.options), of: "'\(path)', section at line \(section.line)")
        switch section.kind {
        case "inject-error": try rules.addInjection(reader)
        default: try rules.addStateChange(reader)
        }
    }

    /// `[inject-error]`, or with an identifier that nobody needs: `[inject-error "x"]`.
    private static func header(_ line: String, _ place: String) throws(BlockError) -> String {
        guard line.hasSuffix("]") else {
            throw BlockError(.invalidArgument, "\(place): a section's name ends with ']'")
        }
        let inner = line.dropFirst().dropLast()
        let kind = String(inner.split(separator: " ").first ?? "")
        guard kind == "inject-error" || kind == "set-state" else {
            throw BlockError(
                .invalidArgument, "\(place): there is no section '\(kind)'",
                remedy: "use inject-error or set-state")
        }
        return kind
    }

    private static func assignment(
        _ line: String, _ place: String
    ) throws(BlockError) -> (String, String) {
        let parts = line.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else { throw noAssignment(place) }
        let value = trimmed(parts[1])
        guard value.count >= 2, value.hasPrefix("\""), value.hasSuffix("\"") else {
            throw noAssignment(place)
        }
        return (trimmed(parts[0]), String(value.dropFirst().dropLast()))
    }

    private static func noAssignment(_ place: String) -> BlockError {
        BlockError(.invalidArgument, "\(place): expected a line like event = \"l2_update\"")
    }

    private static func trimmed(_ text: Substring) -> String {
        let isSpace: (Character) -> Bool = { $0 == " " || $0 == "\t" || $0 == "\r" }
        var rest = text.drop(while: isSpace)
        while let last = rest.last, isSpace(last) { rest.removeLast() }
        return String(rest)
    }
}
