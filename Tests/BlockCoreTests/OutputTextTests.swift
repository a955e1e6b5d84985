import BlockCore
import Testing

@Suite struct OutputTextTests {
    @Test(arguments: [0, 7, 10, 1_234_567_890, -1, -65536, .max, .min])
    func numbersAreWrittenAsStringsDo(_ value: Int) {
        var text = OutputText()
        text.append(value)
        #expect(String(decoding: text.bytes, as: UTF8.self) == String(value))
    }

    @Test(arguments: [0, 1, 10, 255, 0xdead_beef, .max, -1])
    func numbersInBase16AreWrittenAsStringsDo(_ value: Int) {
        var text = OutputText()
        text.append(hexadecimal: value)
        #expect(
            String(decoding: text.bytes, as: UTF8.self)
                == String(UInt(bitPattern: value), radix: 16))
    }

    @Test func piecesFollowEachOther() {
        var text = OutputText()
        text.append(literal: "{")
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
