import BlockCore
import QMP

/// The options of a command: its words are read by it, and its help is made of it.
///
/// The rules are those of getopt_long(3): `-k PATH`, `-kPATH`, `--socket PATH`, `--socket=PATH`; letters of flags
/// together, the last of which may take a value; `--` ends the options; operands may stand among them. The word
/// behind an option that takes a value is the value, whatever it begins with. As with the other commands, `-k=PATH` is
/// `-kPATH`, and names are whole.
struct OptionTable<Values>: Sendable {
    struct Option: Sendable {
        /// What an option does to the values. These are functions, since key paths to forty fields would take longer
        /// to make than all the rest.
        fileprivate enum Action: Sendable {
            case flag(@Sendable (inout Values) -> Void)
            case text(@Sendable (inout Values, String) -> Void)
            case number(ClosedRange<Int>, @Sendable (inout Values, Int) -> Void)
        }

        let letter: Character?
        /// Without dashes.
        let name: String
        /// nil: it is understood, and not shown.
        let help: String?
        fileprivate let action: Action
        /// No word behind it counts.
        fileprivate var isLast = false

        static func flag(
            _ letter: Character?, _ name: String, _ help: String?, isLast: Bool = false,
            _ set: @escaping @Sendable (inout Values) -> Void
        ) -> Option {
            Option(letter: letter, name: name, help: help, action: .flag(set), isLast: isLast)
        }

        static func text(
            _ letter: Character?, _ name: String, _ help: String?,
            _ set: @escaping @Sendable (inout Values, String) -> Void
        ) -> Option {
            Option(letter: letter, name: name, help: help, action: .text(set))
        }

        static func number(
            _ letter: Character?, _ name: String, _ help: String?,
            in range: ClosedRange<Int> = .min ... .max,
            _ set: @escaping @Sendable (inout Values, Int) -> Void
        ) -> Option {
            Option(letter: letter, name: name, help: help, action: .number(range, set))
        }

        var takesValue: Bool {
            if case .flag = action { false } else { true }
        }
    }

    private let options: [Option]

    init(_ options: [Option]) { self.options = options }

    /// The options that the help shows, by their long names.
    var names: [String] {
        options.filter { $0.help != nil }.map { "--" + $0.name }
    }

    // MARK: Words

    /// - Parameter words: without the program's and the command's name.
    /// - Returns: the operands, in their order.
    /// - Throws: `invalidArgument` that names the option.
    func read(_ words: [String], into values: inout Values) throws(BlockError) -> [String] {
        var operands: [String] = []
        var rest = words[...]
        var isDone = false
        while !isDone, let word = rest.popFirst() {
            if word == "--" {
                return operands + rest
            } else if word.hasPrefix("--") {
                isDone = try readName(word, &rest, into: &values)
            } else if word.hasPrefix("-"), word != "-" {
                isDone = try readLetters(word, &rest, into: &values)
            } else {
                operands.append(word)
            }
        }
        return operands
    }

    /// - Returns: whether no word behind it counts.
    private func readName(
        _ word: String, _ rest: inout ArraySlice<String>, into values: inout Values
    ) throws(BlockError) -> Bool {
        let equals = word.firstIndex(of: "=")
        let name = String(word[..<(equals ?? word.endIndex)])
        let value = equals.map { String(word[word.index(after: $0)...]) }
        guard let option = options.first(where: { $0.name == name.dropFirst(2) }) else {
            throw unknown(name, in: name)
        }
        try take(option, name, value, &rest, into: &values)
        return option.isLast
    }

    /// - Returns: whether no word behind it counts.
    private func readLetters(
        _ word: String, _ rest: inout ArraySlice<String>, into values: inout Values
    ) throws(BlockError) -> Bool {
        var letters = word.dropFirst()
        while let letter = letters.popFirst() {
            guard let option = options.first(where: { $0.letter == letter }) else {
                throw unknown("-\(letter)", in: word)
            }
            var value: String?
            if letters.first == "=" {
                value = String(letters.dropFirst())
                letters = ""
            } else if option.takesValue, !letters.isEmpty {
                value = String(letters)
                letters = ""
            }
            try take(option, "-\(letter)", value, &rest, into: &values)
            if option.isLast { return true }
        }
        return false
    }

    /// - Parameters:
    ///   - name: as it was given.
    ///   - attached: the value in the same word.
    private func take(
        _ option: Option, _ name: String, _ attached: String?, _ rest: inout ArraySlice<String>,
        into values: inout Values
    ) throws(BlockError) {
        if case .flag(let set) = option.action {
            guard attached == nil else {
                throw BlockError(.invalidArgument, "option '\(name)' takes no value")
            }
            return set(&values)
        }
        guard let text = attached ?? rest.popFirst() else {
            throw BlockError(.invalidArgument, "option '\(name)' needs a value")
        }
        switch option.action {
        case .flag: break
        case .text(let set): set(&values, text)
        case .number(let range, let set):
            guard let number = Int(text), range.contains(number) else {
                let bounds =
                    range == .min ... .max ? "" : " from \(range.lowerBound) to \(range.upperBound)"
                throw BlockError(
                    .invalidArgument, "option '\(name)' takes a number\(bounds), not '\(text)'")
            }
            set(&values, number)
        }
    }

    private func unknown(_ name: String, in word: String) -> BlockError {
        // A long name with one dash is a slip, too.
        let near = OptionReader.nearest(to: word.hasPrefix("--") ? word : "-" + word, in: names)
        return BlockError(
            .invalidArgument,
            "there is no option '\(name)'" + (name == word ? "" : ", as in '\(word)'"),
            remedy: near.map { "did you mean '\($0)'?" } ?? "see --help")
    }

    // MARK: Help

    private static var helpColumn: Int { 26 }
    private static var helpWidth: Int { 80 }

    /// A row, or several, for each option.
    var help: String {
        options.compactMap { option in option.help.map { Self.describe(option, $0) } }
            .joined(separator: "\n")
    }

    private static func describe(_ option: Option, _ help: String) -> String {
        var line = "  " + (option.letter.map { "-\($0), " } ?? "") + "--" + option.name
        if option.takesValue { line += " <\(option.name)>" }
        let indent = String(repeating: " ", count: helpColumn)
        var lines: [String] = []
        if line.count >= helpColumn {
            lines.append(line)
            line = ""
        }
        line += indent.dropFirst(line.count)
        for word in help.split(separator: " ") {
            if line.count + word.count + 1 > helpWidth {
                lines.append(line)
                line = indent
            }
            line += (line.count == helpColumn ? "" : " ") + word
        }
        lines.append(line)
        return lines.joined(separator: "\n")
    }
}
