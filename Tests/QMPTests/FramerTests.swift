import BlockCore
import QMP
import Testing

@Suite struct FramerTests {
    /// Documents as text; errors as `!`.
    private func pieces(_ bytes: some Sequence<UInt8>) -> [String] {
        var framer = JSONFramer()
        return bytes.compactMap { byte in
            switch framer.take(byte) {
            case nil: nil
            case .success(let value): value.text()
            case .failure: "!"
            }
        }
    }

    @Test func documentsNeedNoNewlines() {
        #expect(
            pieces("{\"a\":1}{\"b\":\"}\\\"{\"}\n\n [2] ".utf8) == [
                #"{"a": 1}"#, #"{"b": "}\"{"}"#, "[2]",
            ])
    }

    @Test func readingGoesOnAfterGarbage() {
        #expect(pieces("hello\n{\"a\":1}".utf8) == ["!", #"{"a": 1}"#])
        #expect(pieces("hello {\"a\":1}".utf8) == ["!", #"{"a": 1}"#])
        #expect(pieces("{\"a\": nonsense}{\"a\":1}".utf8) == ["!", #"{"a": 1}"#])
        #expect(pieces("{\"a\": \"no end\n{\"a\":1}".utf8) == ["!", #"{"a": 1}"#])
    }

    @Test func byteFFStartsAfresh() {
        #expect(
            pieces(Array("{\"a\": [".utf8) + [0xff] + Array("{\"b\":1}".utf8)) == [
                "!", #"{"b": 1}"#,
            ])
    }

    @Test func tooDeepADocumentIsSkippedToItsLineEnd() {
        let deep = String(repeating: "[", count: Limits.jsonDepthMax + 50)
        #expect(pieces("\(deep)\n{\"a\":1}".utf8) == ["!", #"{"a": 1}"#])
    }

    @Test func anEndlessDocumentIsRefused() {
        var framer = JSONFramer()
        var errors = 0
        for byte in "{\"a\": \"".utf8 { _ = framer.take(byte) }
        for _ in 0..<(Limits.jsonBytesMax + 10) {
            if case .failure? = framer.take(UInt8(ascii: "x")) { errors += 1 }
        }
        #expect(errors == 1)
    }
}
