import BlockCore

/// Parses one JSON document (RFC 8259), bounded and without recursion.
///
/// As QMP clients may, it also accepts strings in single quotes. Refused are: invalid UTF-8, lone
/// surrogates, a zero byte in a string (it would end a path early), duplicate keys, and what exceeds
/// the limits of bytes, depth and number of values.
public struct JSONParser {
    private let bytes: [UInt8]
    private var position = 0
    private var valueCount = 0
    private var stack: [Frame] = []

    /// A container whose end has not come yet.
    private struct Frame {
        let isArray: Bool
        var items: [JSONValue] = []
        var object = JSONObject()
        var key = ""

        var value: JSONValue { isArray ? .array(items) : .object(object) }
    }

    private init(_ bytes: [UInt8]) {
        self.bytes = bytes
    }

    /// - Throws: `invalidArgument`, with the place in bytes.
    public static func parse(_ text: some StringProtocol) throws(BlockError) -> JSONValue {
        try parse(Array(text.utf8))
    }

    /// - Throws: `invalidArgument`, with the place in bytes.
    public static func parse(_ bytes: [UInt8]) throws(BlockError) -> JSONValue {
        guard bytes.count <= Limits.jsonBytesMax else {
            throw BlockError(
                .invalidArgument, "the JSON text is longer than \(Limits.jsonBytesMax) bytes")
        }
        var parser = JSONParser(bytes)
        let value = try parser.document()
        parser.skipSpace()
        guard parser.position == bytes.count else { throw parser.failure("expected the end") }
        return value
    }

    // MARK: Structure

    private mutating func document() throws(BlockError) -> JSONValue {
        while true {
            guard var value = try valueOrOpening() else { continue }
            // The value goes into its container, which may end with it.
            while true {
                guard !stack.isEmpty else { return value }
                store(value)
                guard let closed = try separatorOrClosing() else { break }
                value = closed
            }
        }
    }

    /// - Returns: a whole value, or `nil` when a container began that is not empty.
    private mutating func valueOrOpening() throws(BlockError) -> JSONValue? {
        skipSpace()
        valueCount += 1
        guard valueCount <= Limits.jsonValueCountMax else {
            throw failure("more than \(Limits.jsonValueCountMax) values")
        }
        guard let byte = peek else { throw failure("expected a value, not the end") }
        switch byte {
        case UInt8(ascii: "{"), UInt8(ascii: "["):
            guard stack.count < Limits.jsonDepthMax else {
                throw failure("nested deeper than \(Limits.jsonDepthMax)")
            }
            position += 1
            let isArray = byte == UInt8(ascii: "[")
            skipSpace()
            if peek == (isArray ? UInt8(ascii: "]") : UInt8(ascii: "}")) {
                position += 1
                return isArray ? [] : [:]
            }
            stack.append(Frame(isArray: isArray))
            if !isArray { try key() }
            return nil
        case UInt8(ascii: "\""), UInt8(ascii: "'"):
            return .string(try string())
        case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"):
            return try number()
        default:
            return try keyword()
        }
    }

    private mutating func store(_ value: JSONValue) {
        let top = stack.count - 1
        if stack[top].isArray {
            stack[top].items.append(value)
        } else {
            stack[top].object[stack[top].key] = value
        }
    }

    /// - Returns: the container that ends here, or `nil` when another member follows.
    private mutating func separatorOrClosing() throws(BlockError) -> JSONValue? {
        skipSpace()
        let isArray = stack[stack.count - 1].isArray
        switch peek {
        case UInt8(ascii: ","):
            position += 1
            if !isArray { try key() }
            return nil
        case UInt8(ascii: "]") where isArray, UInt8(ascii: "}") where !isArray:
            position += 1
            return stack.removeLast().value
        default:
            throw failure("expected ',' or '\(isArray ? "]" : "}")'")
        }
    }

    private mutating func key() throws(BlockError) {
        skipSpace()
        guard peek == UInt8(ascii: "\"") || peek == UInt8(ascii: "'") else {
            throw failure("expected a key in quotes")
        }
        let key = try string()
        guard stack[stack.count - 1].object[key] == nil else {
            throw failure("duplicate key '\(key)'")
        }
        stack[stack.count - 1].key = key
        skipSpace()
        guard peek == UInt8(ascii: ":") else { throw failure("expected ':'") }
        position += 1
    }

    // MARK: Scalars

    private mutating func keyword() throws(BlockError) -> JSONValue {
        let start = position
        while let byte = peek, byte >= UInt8(ascii: "a"), byte <= UInt8(ascii: "z") {
            position += 1
        }
        switch String(decoding: bytes[start..<position].prefix(8), as: UTF8.self) {
        case "true": return true
        case "false": return false
        case "null": return nil
        default:
            position = start
            throw failure("expected a value")
        }
    }

    private mutating func number() throws(BlockError) -> JSONValue {
        let start = position
        if peek == UInt8(ascii: "-") { position += 1 }
        let hasLeadingZero = peek == UInt8(ascii: "0")
        let wholeDigits = skipDigits()
        guard wholeDigits > 0, !hasLeadingZero || wholeDigits == 1 else {
            throw failure("invalid number")
        }
        var isWhole = true
        if peek == UInt8(ascii: ".") {
            isWhole = false
            position += 1
            guard skipDigits() > 0 else { throw failure("invalid number") }
        }
        if peek == UInt8(ascii: "e") || peek == UInt8(ascii: "E") {
            isWhole = false
            position += 1
            if peek == UInt8(ascii: "+") || peek == UInt8(ascii: "-") { position += 1 }
            guard skipDigits() > 0 else { throw failure("invalid number") }
        }
        let text = String(decoding: bytes[start..<position], as: UTF8.self)
        if isWhole {
            if let value = Int(text) { return .integer(value) }
            if let value = UInt64(text) { return .unsigned(value) }
        }
        guard let value = Double(text), value.isFinite else { throw failure("number too large") }
        return .double(value)
    }

    private mutating func skipDigits() -> Int {
        let start = position
        while let byte = peek, byte >= UInt8(ascii: "0"), byte <= UInt8(ascii: "9") {
            position += 1
        }
        return position - start
    }

    private mutating func string() throws(BlockError) -> String {
        let quote = bytes[position]
        position += 1
        var content: [UInt8] = []
        while true {
            guard let byte = peek else { throw failure("the string has no end") }
            switch byte {
            case quote:
                position += 1
                guard let text = String(validating: content, as: UTF8.self) else {
                    throw failure("the string is not valid UTF-8")
                }
                return text
            case UInt8(ascii: "\\"):
                position += 1
                try escape(into: &content)
            case 0..<0x20:
                throw failure("control character in a string")
            default:
                content.append(byte)
                position += 1
            }
        }
    }

    private mutating func escape(into content: inout [UInt8]) throws(BlockError) {
        guard let byte = peek else { throw failure("the string has no end") }
        position += 1
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "'"), UInt8(ascii: "\\"), UInt8(ascii: "/"):
            content.append(byte)
        case UInt8(ascii: "b"): content.append(0x08)
        case UInt8(ascii: "f"): content.append(0x0c)
        case UInt8(ascii: "n"): content.append(0x0a)
        case UInt8(ascii: "r"): content.append(0x0d)
        case UInt8(ascii: "t"): content.append(0x09)
        case UInt8(ascii: "u"): try unicodeEscape(into: &content)
        default: throw failure("invalid escape in a string")
        }
    }

    private mutating func unicodeEscape(into content: inout [UInt8]) throws(BlockError) {
        var code = try fourHexDigits()
        if code & 0xfc00 == 0xd800 {
            guard peek == UInt8(ascii: "\\"), position + 1 < bytes.count,
                bytes[position + 1] == UInt8(ascii: "u")
            else { throw failure("lone surrogate in a string") }
            position += 2
            let low = try fourHexDigits()
            guard low & 0xfc00 == 0xdc00 else { throw failure("lone surrogate in a string") }
            code = 0x1_0000 + (code & 0x3ff) << 10 + (low & 0x3ff)
        }
        guard code != 0 else { throw failure("a string cannot hold a zero byte") }
        guard let scalar = Unicode.Scalar(code) else {
            throw failure("lone surrogate in a string")
        }
        content.append(contentsOf: Array(String(Character(scalar)).utf8))
    }

    private mutating func fourHexDigits() throws(BlockError) -> UInt32 {
        guard bytes.count - position >= 4,
            bytes[position..<(position + 4)].allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }
            ),
            let code = UInt32(
                String(decoding: bytes[position..<(position + 4)], as: UTF8.self), radix: 16)
        else { throw failure("invalid \\u escape in a string") }
        position += 4
        return code
    }

    // MARK: Bytes

    private var peek: UInt8? { position < bytes.count ? bytes[position] : nil }

    private mutating func skipSpace() {
        while let byte = peek, byte == 0x20 || (byte >= 0x09 && byte <= 0x0d && byte != 0x0b) {
            position += 1
        }
    }

    private func failure(_ reason: String) -> BlockError {
        BlockError(.invalidArgument, "JSON parse error at byte \(position): \(reason)")
    }
}
