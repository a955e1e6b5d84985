import BlockCore

/// Parses one JSON document, bounded in depth, size and number of values (``Limits``).
///
/// Takes what QMP clients send: RFC 8259, and strings in single quotes. Without recursion, so that
/// deep input costs memory in proportion to its length and never the stack.
public struct JSONParser {
    private let bytes: [UInt8]
    private var position = 0
    private var valueCount = 0

    /// - Throws: `invalidArgument` naming the byte where the text is no JSON, or the limit it breaks.
    public static func parse(_ bytes: [UInt8]) throws(BlockError) -> JSONValue {
        guard bytes.count <= Limits.jsonBytesMax else {
            throw BlockError(
                .exhausted, "a JSON document is longer than \(Limits.jsonBytesMax) bytes")
        }
        var parser = JSONParser(bytes: bytes)
        let value = try parser.document()
        parser.skipSpace()
        guard parser.position == bytes.count else { throw parser.failure("more follows the value") }
        return value
    }

    public static func parse(_ text: String) throws(BlockError) -> JSONValue {
        try parse(Array(text.utf8))
    }

    private init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    /// A container that is being filled.
    private enum Open {
        case array([JSONValue])
        case object(JSONObject, key: String)
    }

    private mutating func document() throws(BlockError) -> JSONValue {
        var stack: [Open] = []
        while true {
            skipSpace()
            var value: JSONValue
            switch try peek() {
            case UInt8(ascii: "["):
                position += 1
                skipSpace()
                if try peek() != UInt8(ascii: "]") {
                    try push(.array([]), to: &stack)
                    continue
                }
                position += 1
                value = .array([])
            case UInt8(ascii: "{"):
                position += 1
                skipSpace()
                if try peek() != UInt8(ascii: "}") {
                    try push(.object(JSONObject(), key: try key()), to: &stack)
                    continue
                }
                position += 1
                value = .object(JSONObject())
            default:
                value = try scalar()
            }
            try count()
            // Into its container, and out of those that it ends.
            while true {
                guard let open = stack.popLast() else { return value }
                guard let finished = try add(value, to: open, &stack) else { break }
                value = finished
            }
        }
    }

    private mutating func push(_ open: Open, to stack: inout [Open]) throws(BlockError) {
        guard stack.count < Limits.jsonDepthMax else {
            throw BlockError(.exhausted, "JSON nests deeper than \(Limits.jsonDepthMax)")
        }
        stack.append(open)
    }

    private mutating func count() throws(BlockError) {
        valueCount += 1
        guard valueCount <= Limits.jsonValueCountMax else {
            throw BlockError(.exhausted, "JSON has more than \(Limits.jsonValueCountMax) values")
        }
    }

    /// - Returns: the container, when the value was its last.
    private mutating func add(
        _ value: JSONValue, to open: Open, _ stack: inout [Open]
    ) throws(BlockError) -> JSONValue? {
        skipSpace()
        let next = try take()
        switch open {
        case .array(var values):
            values.append(value)
            if next == UInt8(ascii: "]") { return .array(values) }
            guard next == UInt8(ascii: ",") else { throw failure("expected ',' or ']'") }
            stack.append(.array(values))
        case .object(var object, let key):
            guard object[key] == nil else { throw failure("the key '\(key)' stands twice") }
            object[key] = value
            if next == UInt8(ascii: "}") { return .object(object) }
            guard next == UInt8(ascii: ",") else { throw failure("expected ',' or '}'") }
            skipSpace()
            stack.append(.object(object, key: try self.key()))
        }
        return nil
    }

    private mutating func key() throws(BlockError) -> String {
        let quote = try peek()
        guard quote == UInt8(ascii: "\"") || quote == UInt8(ascii: "'") else {
            throw failure("expected a key in quotes")
        }
        let key = try string()
        skipSpace()
        guard try take() == UInt8(ascii: ":") else { throw failure("expected ':'") }
        return key
    }

    private mutating func scalar() throws(BlockError) -> JSONValue {
        switch try peek() {
        case UInt8(ascii: "\""), UInt8(ascii: "'"): return .string(try string())
        case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): return try number()
        default:
            for (word, value) in [
                ("null", JSONValue.null), ("true", .bool(true)), ("false", .bool(false)),
            ] where bytes[position...].starts(with: word.utf8) {
                position += word.utf8.count
                return value
            }
            throw failure("expected a value")
        }
    }

    private mutating func number() throws(BlockError) -> JSONValue {
        let start = position
        func isDigit(_ byte: UInt8) -> Bool { byte >= 0x30 && byte <= 0x39 }
        func digits() -> Int {
            let first = position
            while position < bytes.count, isDigit(bytes[position]) { position += 1 }
            return position - first
        }
        if bytes[position] == UInt8(ascii: "-") { position += 1 }
        let leading = position
        let whole = digits()
        guard whole > 0, whole == 1 || bytes[leading] != 0x30 else {
            throw failure("a number is malformed")
        }
        var isWhole = true
        if position < bytes.count, bytes[position] == UInt8(ascii: ".") {
            isWhole = false
            position += 1
            guard digits() > 0 else { throw failure("a number is malformed") }
        }
        if position < bytes.count, bytes[position] | 0x20 == UInt8(ascii: "e") {
            isWhole = false
            position += 1
            if position < bytes.count,
                bytes[position] == UInt8(ascii: "+") || bytes[position] == UInt8(ascii: "-")
            {
                position += 1
            }
            guard digits() > 0 else { throw failure("a number is malformed") }
        }
        let text = String(decoding: bytes[start..<position], as: UTF8.self)
        if isWhole {
            if let value = Int(text) { return .integer(value) }
            if let value = UInt64(text) { return .unsigned(value) }
        }
        guard let value = Double(text), value.isFinite else {
            throw failure("a number is too large")
        }
        return .double(value)
    }

    private mutating func string() throws(BlockError) -> String {
        let quote = try take()
        var result: [UInt8] = []
        while true {
            let byte = try take()
            if byte == quote { break }
            if byte < 0x20 { throw failure("a control character stands in a string") }
            guard byte == UInt8(ascii: "\\") else {
                result.append(byte)
                continue
            }
            let escape = try take()
            switch escape {
            case UInt8(ascii: "\""), UInt8(ascii: "'"), UInt8(ascii: "\\"), UInt8(ascii: "/"):
                result.append(escape)
            case UInt8(ascii: "b"): result.append(8)
            case UInt8(ascii: "f"): result.append(12)
            case UInt8(ascii: "n"): result.append(10)
            case UInt8(ascii: "r"): result.append(13)
            case UInt8(ascii: "t"): result.append(9)
            case UInt8(ascii: "u"): result.append(contentsOf: Array(try unicode().utf8))
            default: throw failure("an escape is unknown")
            }
        }
        guard let text = String(validating: result, as: UTF8.self) else {
            throw failure("a string is not UTF-8")
        }
        return text
    }

    private mutating func unicode() throws(BlockError) -> String {
        let first = try hexadecimal()
        var scalar = UInt32(first)
        if first >= 0xd800, first < 0xdc00 {
            guard try take() == UInt8(ascii: "\\"), try take() == UInt8(ascii: "u") else {
                throw failure("half of a surrogate pair is missing")
            }
            let second = try hexadecimal()
            guard second >= 0xdc00, second < 0xe000 else {
                throw failure("a surrogate pair is malformed")
            }
            scalar = 0x10000 + (UInt32(first) - 0xd800) << 10 + (UInt32(second) - 0xdc00)
        }
        guard let value = Unicode.Scalar(scalar) else { throw failure("a surrogate stands alone") }
        return String(Character(value))
    }

    private mutating func hexadecimal() throws(BlockError) -> UInt16 {
        var value: UInt16 = 0
        for _ in 0..<4 {
            let byte = try take()
            guard let digit = Character(Unicode.Scalar(byte)).hexDigitValue else {
                throw failure("an escape is malformed")
            }
            value = value << 4 | UInt16(digit)
        }
        return value
    }

    private mutating func skipSpace() {
        while position < bytes.count, [0x20, 0x09, 0x0a, 0x0d].contains(bytes[position]) {
            position += 1
        }
    }

    private func peek() throws(BlockError) -> UInt8 {
        guard position < bytes.count else { throw failure("the text ends too early") }
        return bytes[position]
    }

    private mutating func take() throws(BlockError) -> UInt8 {
        let byte = try peek()
        position += 1
        return byte
    }

    private func failure(_ what: String) -> BlockError {
        BlockError(.invalidArgument, "JSON parse error at byte \(position): \(what)")
    }
}
