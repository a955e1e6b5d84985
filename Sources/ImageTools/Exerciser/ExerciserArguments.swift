import BlockCore

/// The arguments of one exerciser command: options first or between, flags together or apart.
struct ExerciserArguments {
    private var flags: Set<Character> = []
    private var values: [Character: String] = [:]
    /// What is no option, in order.
    private(set) var rest: [String] = []

    /// - Parameter known: the option letters; a `:` behind one says that it takes a value.
    init(_ words: [String], known: String, command: String) throws(BlockError) {
        var takesValue: [Character: Bool] = [:]
        var last: Character?
        for letter in known {
            if letter == ":" {
                if let last { takesValue[last] = true }
            } else {
                takesValue[letter] = false
                last = letter
            }
        }
        var words = words[...]
        while let word = words.popFirst() {
            guard word.hasPrefix("-"), word != "-" else {
                rest.append(word)
                continue
            }
            var letters = word.dropFirst()
            while let letter = letters.popFirst() {
                guard let wantsValue = takesValue[letter] else {
                    throw BlockError(
                        .invalidArgument, "\(command) has no option '-\(letter)'",
                        remedy: "try 'help \(command)'")
                }
                guard wantsValue else {
                    flags.insert(letter)
                    continue
                }
                guard let value = letters.isEmpty ? words.popFirst() : String(letters) else {
                    throw BlockError(
                        .invalidArgument, "option '-\(letter)' of \(command) needs a value")
                }
                values[letter] = value
                break
            }
        }
    }

    /// The remedy of all errors of misuse, which are known by it.
    static let remedy = "'help COMMAND' tells what a command takes"

    /// A line that makes no sense, in the words that scripts know.
    static func misuse(_ words: String) -> BlockError {
        BlockError(.invalidArgument, words, remedy: remedy)
    }

    func has(_ flag: Character) -> Bool { flags.contains(flag) }
    func value(_ option: Character) -> String? { values[option] }

    /// A number of bytes, with a unit or without.
    static func bytes(_ text: String) throws(BlockError) -> Int {
        guard let value = SizeText.parse(text) else {
            let isNumber = text.allSatisfy(\.isWholeNumber) && !text.isEmpty
            throw misuse(
                isNumber
                    ? "Parsing error: argument too large -- \(text)"
                    : "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- \(text)"
            )
        }
        return value
    }

    /// The byte that `-P` fills with or checks for.
    func pattern() throws(BlockError) -> UInt8? {
        guard let text = value("P") else { return nil }
        let number = text.hasPrefix("0x") ? UInt8(text.dropFirst(2), radix: 16) : UInt8(text)
        guard let number else {
            throw Self.misuse("\(text) is not a valid pattern byte")
        }
        return number
    }
}
