import BlockCore
import QMP
import Testing

@Suite struct JSONTests {
    static let documents: [(String, JSONValue)] = [
        ("null", JSONValue.null), (" true ", true), ("-0", .integer(0)), ("-12", .integer(-12)),
        ("9223372036854775807", .integer(.max)), ("-9223372036854775808", .integer(.min)),
        ("9223372036854775808", .unsigned(1 << 63)), ("18446744073709551616", .double(0x1p64)),
        ("1.5e3", .double(1500)), (#""a\u00e9\n\/\"""#, .string("aé\n/\"")),
        (#""\ud83d\ude00""#, .string("😀")), (#"'it is "quoted"'"#, .string(#"it is "quoted""#)),
        (#"'\''"#, "'"), ("[]", []), ("{}", [:]), ("[1,[2,{}]]", [1, [2, [:]]]),
        (#"{"a": 1, 'b': [null]}"#, ["a": 1, "b": [nil]]),
    ]

    @Test(arguments: documents)
    func aDocumentIsRead(text: String, expected: JSONValue) throws {
        #expect(try JSONParser.parse(text) == expected)
    }

    @Test(arguments: [
        "", " ", "nul", "tru e", "01", "1.", ".5", "+1", "1e", "-", "1e999", "\"", "\"\\x\"",
        "\"\\u12\"", "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\\u0000\"", "\"a\nb\"",
        "[", "[1", "[1,", "[1,]", "[,1]", "[1}", "{", "{\"a\"", "{\"a\":", "{\"a\":1,}", "{a:1}",
        "{\"a\":1 \"b\":2}", "{\"a\":1,\"a\":2}", "1 2", "{} x", "[1]]", "NaN", "Infinity",
    ])
    func whatIsNoJSONIsRefused(text: String) {
        #expect(throws: BlockError.self, "\(text)") { try JSONParser.parse(text) }
    }

    @Test func invalidUTF8IsRefused() {
        for bytes: [UInt8] in [[0xff], [0xc0, 0x80], [0xed, 0xa0, 0x80], [0xe2, 0x82]] {
            #expect(throws: BlockError.self) { try JSONParser.parse([0x22] + bytes + [0x22]) }
        }
    }

    @Test func depthAndCountHaveLimits() {
        func nested(_ depth: Int) -> String {
            String(repeating: "[", count: depth) + String(repeating: "]", count: depth)
        }
        #expect(throws: Never.self) { try JSONParser.parse(nested(Limits.jsonDepthMax)) }
        #expect(throws: BlockError.self) { try JSONParser.parse(nested(Limits.jsonDepthMax + 1)) }
        #expect(throws: BlockError.self) {
            try JSONParser.parse(String(repeating: "[", count: 1_000_000))
        }
        let many = "[" + String(repeating: "1,", count: Limits.jsonValueCountMax) + "1]"
        #expect(throws: BlockError.self) { try JSONParser.parse(many) }
    }

    @Test func textIsWrittenAsQEMUWritesIt() {
        let value: JSONValue = ["a": [1, "é😀\u{1}\"\\"], "b": [:], "c": .double(0.1), "d": []]
        #expect(
            value.text()
                == #"{"a": [1, "\u00E9\uD83D\uDE00\u0001\"\\"], "b": {}, "c": 0.1, "d": []}"#)
        #expect(
            JSONValue.object(["a": [1, true], "b": ["c": nil]]).text(pretty: true) == """
                {
                    "a": [
                        1,
                        true
                    ],
                    "b": {
                        "c": null
                    }
                }
                """)
    }

    @Test func doublesComeBackTheSame() throws {
        for value in [0.1, 1e300, -2.5e-300, 1.7976931348623157e308, 123456789.123456789, 1e20] {
            #expect(try JSONParser.parse(JSONValue.double(value).text()) == .double(value))
        }
    }
}
