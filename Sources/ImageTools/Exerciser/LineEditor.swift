/// A line of commands while a person types it at a terminal, and the lines before it.
///
/// Pure: bytes of the terminal come in, what to do comes out. Keys are those of shells: arrows, Home, End,
/// Delete, Tab to complete a command's name, and `^A ^B ^D ^E ^F ^K ^L ^N ^P ^U ^W`.
///
///     plain ──ESC──▶ escape ──[ or O──▶ sequence ──letter or ~──▶ plain
///
/// Invariant: `0 ≤ cursor ≤ line.count`.
public struct LineEditor {
    public enum Action: Equatable {
        /// More bytes are needed, or nothing changed.
        case none
        /// The line looks different: draw ``drawing`` again.
        case redraw
        /// The same on an empty screen.
        case clear
        /// The line is complete.
        case line(String)
        /// `^C`
        case interrupt
        /// `^D` on an empty line.
        case end
    }

    private enum State {
        case plain
        case escape
        case sequence(String)
    }

    /// Lines that are kept.
    static let historyCountMax = 1000
    static let lineCountMax = 4096

    public let prompt: String
    private let names: [String]
    private var line: [Character] = []
    private var cursor = 0
    private var history: [String] = []
    /// Where in the history the line is from; its count: it is new.
    private var place = 0
    /// The new line, while one of the history is shown.
    private var draft: [Character] = []
    private var state = State.plain
    /// The start of a character of several bytes.
    private var pending: [UInt8] = []

    /// - Parameter names: what Tab completes the first word to.
    public init(prompt: String, names: [String]) {
        self.prompt = prompt
        self.names = names
    }

    /// The prompt and the line as escape sequences of a terminal, the cursor in its place.
    public var drawing: String {
        let back = line.count - cursor
        return "\r\u{1b}[K\(prompt)\(String(line))" + (back > 0 ? "\u{1b}[\(back)D" : "")
    }

    // MARK: Bytes

    public mutating func take(_ byte: UInt8) -> Action {
        switch state {
        case .escape:
            let begins = byte == UInt8(ascii: "[") || byte == UInt8(ascii: "O")
            state = begins ? .sequence("") : .plain
            return .none
        case .sequence(let start):
            return takeSequence(start, byte)
        case .plain:
            if byte >= 0x80 || !pending.isEmpty { return takePart(byte) }
            return byte >= 0x20 && byte != 0x7f
                ? insert(Character(Unicode.Scalar(byte))) : control(byte)
        }
    }

    private mutating func takeSequence(_ start: String, _ byte: UInt8) -> Action {
        let character = Character(Unicode.Scalar(byte))
        if character >= "0" && character <= "9" || character == ";" {
            // Nothing that is longer has a meaning here.
            state = start.count < 8 ? .sequence(start + String(character)) : .plain
            return .none
        }
        state = .plain
        switch (start, character) {
        case (_, "A"): return recall(place - 1)
        case (_, "B"): return recall(place + 1)
        case (_, "C"): return move(to: cursor + 1)
        case (_, "D"): return move(to: cursor - 1)
        case (_, "H"), ("1", "~"), ("7", "~"): return move(to: 0)
        case (_, "F"), ("4", "~"), ("8", "~"): return move(to: line.count)
        case ("3", "~"): return delete(cursor..<min(cursor + 1, line.count))
        default: return .none
        }
    }

    /// A byte of a character in UTF-8.
    private mutating func takePart(_ byte: UInt8) -> Action {
        pending.append(byte)
        if let text = String(validating: pending, as: UTF8.self), let character = text.first {
            pending = []
            return insert(character)
        }
        if pending.count >= 4 { pending = [] }
        return .none
    }

    private mutating func control(_ byte: UInt8) -> Action {
        switch byte {
        case 1: return move(to: 0)
        case 2: return move(to: cursor - 1)
        case 3: return .interrupt
        case 4: return line.isEmpty ? .end : delete(cursor..<min(cursor + 1, line.count))
        case 5: return move(to: line.count)
        case 6: return move(to: cursor + 1)
        case 8, 0x7f: return delete(max(cursor - 1, 0)..<cursor)
        case 9: return complete()
        case 10, 13: return finish()
        case 11: return delete(cursor..<line.count)
        case 12: return .clear
        case 14: return recall(place + 1)
        case 16: return recall(place - 1)
        case 21: return delete(0..<cursor)
        case 23: return delete(wordStart..<cursor)
        case 27:
            state = .escape
            return .none
        default: return .none
        }
    }

    // MARK: Editing

    private mutating func insert(_ character: Character) -> Action {
        guard line.count < Self.lineCountMax else { return .none }
        line.insert(character, at: cursor)
        cursor += 1
        return .redraw
    }

    private mutating func delete(_ range: Range<Int>) -> Action {
        guard !range.isEmpty else { return .none }
        line.removeSubrange(range)
        cursor = range.lowerBound
        return .redraw
    }

    private mutating func move(to target: Int) -> Action {
        guard target >= 0, target <= line.count, target != cursor else { return .none }
        cursor = target
        return .redraw
    }

    /// Where the word before the cursor begins.
    private var wordStart: Int {
        var start = cursor
        while start > 0, line[start - 1] == " " { start -= 1 }
        while start > 0, line[start - 1] != " " { start -= 1 }
        return start
    }

    /// Completes the first word as far as all names agree that begin so.
    private mutating func complete() -> Action {
        let start = String(line[..<cursor])
        guard !start.contains(" ") else { return .none }
        let matching = names.filter { $0.hasPrefix(start) }
        guard var common = matching.first else { return .none }
        for name in matching {
            while !name.hasPrefix(common) { common.removeLast() }
        }
        if matching.count == 1 { common += " " }
        let added = common.dropFirst(start.count)
        guard !added.isEmpty else { return .none }
        line.insert(contentsOf: added, at: cursor)
        cursor += added.count
        return .redraw
    }

    // MARK: History

    private mutating func recall(_ target: Int) -> Action {
        guard target >= 0, target <= history.count else { return .none }
        if place == history.count { draft = line }
        place = target
        line = target == history.count ? draft : Array(history[target])
        cursor = line.count
        return .redraw
    }

    private mutating func finish() -> Action {
        let text = String(line)
        if !line.isEmpty, history.last != text { history.append(text) }
        if history.count > Self.historyCountMax { history.removeFirst() }
        line = []
        draft = []
        cursor = 0
        place = history.count
        return .line(text)
    }
}
