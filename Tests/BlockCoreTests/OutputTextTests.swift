import BlockCore
import Testing

@Suite struct OutputTextTests {
    @Test(arguments: [0, 7, 10, 1_234_567_890, -1, -65536, .max, .min])
    func numbersAreWrittenAsStringsDo(_ value: Int) {
        var text = OutputText()
        text.append(value)
        #expect(String(decoding: text.bytes, as: UTF8.self) == String(value))
    }

    @Test func piecesFollowEachOther() {
        var text = OutputText()
        text.append("{")
        text.append(12)
        text.append(", ")
        text.append(true)
        text.append("é")
        text.append(false)
        #expect(String(decoding: text.bytes, as: UTF8.self) == "{12, trueéfalse")
        text.removeAll()
        #expect(text.bytes.isEmpty)
    }
}
