import Testing

@testable import ImageTools

/// What a person types, and the line that comes of it.
@Suite struct LineEditorTests {
    /// The lines that come of all that is typed.
    private func lines(_ typed: String, names: [String] = []) -> [String] {
        var editor = LineEditor(prompt: "> ", names: names)
        var result: [String] = []
        for byte in typed.utf8 {
            if case .line(let line) = editor.take(byte) { result.append(line) }
        }
        return result
    }

    @Test(arguments: [
        ("read 0 1\r", "read 0 1"), ("ab\u{7f}c\r", "ac"), ("bc\u{1}a\r", "abc"),
        ("ac\u{1b}[Db\r", "abc"), ("abc\u{1b}[D\u{1b}[D\u{1b}[3~\r", "ac"),
        ("abc\u{2}\u{2}\u{b}\r", "a"), ("abc\u{2}\u{15}\r", "c"), ("one two\u{17}\r", "one "),
        ("bc\u{1b}[Ha\u{1b}[Fd\r", "abcd"), ("bc\u{1b}OHa\r", "abc"), ("äö\u{7f}€\r", "ä€"),
        ("x\u{1b}[99;99;99zy\r", "xy"), ("\u{4}\r", ""), ("ab\u{1}\u{4}\r", "b"),
        ("\u{7f}\u{1b}[D\u{1b}[3~a\r", "a"), ("\u{ff}a\r", "\u{ff}a"),
    ])
    func keysEdit(typed: String, line: String) {
        #expect(lines(typed) == [line])
    }

    @Test func arrowsRecallLines() {
        let up = "\u{1b}[A"
        let down = "\u{1b}[B"
        #expect(lines("a\rb\r\(up)\(up)\r") == ["a", "b", "a"])
        #expect(lines("a\rb\rnew\(up)\(up)\(up)\(down)\(down)!\r") == ["a", "b", "new!"])
        #expect(lines("a\ra\r\rb\r\(up)\(up)\r") == ["a", "a", "", "b", "a"])
    }

    @Test func tabCompletesTheCommand() {
        let names = ["read", "readv", "resume", "write"]
        #expect(lines("w\t0 1\r", names: names) == ["write 0 1"])
        #expect(lines("re\ta\t\r", names: names) == ["read"])
        #expect(lines("x\twrite w\t\r", names: names) == ["xwrite w"])
    }

    @Test func theEndIsControlDOnAnEmptyLine() {
        var editor = LineEditor(prompt: "> ", names: [])
        #expect(editor.take(4) == .end)
        #expect(editor.take(3) == .interrupt)
        #expect(editor.take(12) == .clear)
        #expect(editor.take(UInt8(ascii: "a")) == .redraw)
        #expect(editor.drawing == "\r\u{1b}[K> a")
        #expect(editor.take(2) == .redraw)
        #expect(editor.drawing == "\r\u{1b}[K> a\u{1b}[1D")
    }

    @Test func brokenCharactersAreDropped() {
        var editor = LineEditor(prompt: "", names: [])
        for byte in [0xff, 0xfe, 0xfd, 0xfc, 0x61] as [UInt8] { _ = editor.take(byte) }
        #expect(editor.take(13) == .line("a"))
    }
}
