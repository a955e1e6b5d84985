import ImageTools

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A person at a terminal: lines of commands with editing and a history.
///
/// The terminal is as it was whenever no line is being typed.
struct Terminal {
    private var editor: LineEditor

    /// - Returns: `nil` where standard input or output is no terminal.
    init?(prompt: String, names: [String]) {
        guard isatty(STDIN_FILENO) == 1, isatty(STDOUT_FILENO) == 1 else { return nil }
        editor = LineEditor(prompt: prompt, names: names)
    }

    /// Waits for a line; blocks the thread.
    ///
    /// - Returns: `nil` at the end of the input.
    mutating func line() -> String? {
        var old = termios()
        guard tcgetattr(STDIN_FILENO, &old) == 0 else { return nil }
        var raw = old
        raw.c_lflag &= ~tcflag_t(ICANON | ECHO | ISIG)
        guard tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) == 0 else { return nil }
        defer { tcsetattr(STDIN_FILENO, TCSADRAIN, &old) }
        write(editor.drawing)
        var byte: UInt8 = 0
        while true {
            let count = read(STDIN_FILENO, &byte, 1)
            if count < 0, errno == EINTR { continue }
            guard count == 1 else { return nil }
            switch editor.take(byte) {
            case .none: continue
            case .redraw: write(editor.drawing)
            case .clear: write("\u{1b}[H\u{1b}[2J" + editor.drawing)
            case .line(let text):
                write("\n")
                return text
            case .interrupt:
                tcsetattr(STDIN_FILENO, TCSADRAIN, &old)
                write("\n")
                kill(getpid(), SIGINT)
                return nil
            case .end:
                write("\n")
                return nil
            }
        }
    }

    private func write(_ text: String) {
        StandardOutput.print(text)
    }
}
