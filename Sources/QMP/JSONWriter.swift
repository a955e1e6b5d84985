/// Writes JSON the way QEMU does: ASCII only, `", "` and `": "` between, keys in their order.
extension JSONValue {
    /// The value as JSON text, without a final newline.
    ///
    /// - Parameter pretty: a line for each member, indented by four spaces a level.
    public func text(pretty: Bool = false) -> String {
        var writer = JSONWriter(isPretty: pretty)
        writer.write(self, depth: 0)
        return String(decoding: writer.output, as: UTF8.self)
    }

    /// ``text(pretty:)`` as bytes, with CR LF behind it, as QMP ends its messages.
    public func line(pretty: Bool = false) -> [UInt8] {
        var writer = JSONWriter(isPretty: pretty)
        writer.write(self, depth: 0)
        return writer.output + [0x0d, 0x0a]
    }
}

/// Recursion is as deep as the value: parsed ones are bounded, made ones are shallow.
private struct JSONWriter {
    let isPretty: Bool
    var output: [UInt8] = []

    init(isPretty: Bool) {
        self.isPretty = isPretty
    }

    mutating func write(_ value: JSONValue, depth: Int) {
        switch value {
        case .null: append("null")
        case .bool(let value): append(value ? "true" : "false")
        case .integer(let value): append(String(value))
        case .unsigned(let value): append(String(value))
        // JSON has no infinity and no NaN.
        case .double(let value): append(value.isFinite ? "\(value)" : "null")
        case .string(let text): write(text)
        case .array(let values):
            append("[")
            for (index, value) in values.enumerated() {
                separate(index, depth + 1)
                write(value, depth: depth + 1)
            }
            close("]", depth)
        case .object(let object):
            append("{")
            for (index, member) in object.members.enumerated() {
                separate(index, depth + 1)
                write(member.key)
                append(": ")
                write(member.value, depth: depth + 1)
            }
            close("}", depth)
        }
    }

    private mutating func separate(_ index: Int, _ depth: Int) {
        if index > 0 { append(isPretty ? "," : ", ") }
        if isPretty { newline(depth) }
    }

    private mutating func close(_ bracket: String, _ depth: Int) {
        if isPretty { newline(depth) }
        append(bracket)
    }

    private mutating func newline(_ depth: Int) {
        output.append(0x0a)
        output.append(contentsOf: repeatElement(0x20, count: 4 * depth))
    }

    private mutating func write(_ text: String) {
        append("\"")
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": append("\\\"")
            case "\\": append("\\\\")
            case "\u{8}": append("\\b")
            case "\u{c}": append("\\f")
            case "\n": append("\\n")
            case "\r": append("\\r")
            case "\t": append("\\t")
            default:
                if scalar.value >= 0x20, scalar.value < 0x7f {
                    output.append(UInt8(truncatingIfNeeded: scalar.value))
                } else {
                    for unit in String(Character(scalar)).utf16 { escape(unit) }
                }
            }
        }
        append("\"")
    }

    private mutating func escape(_ unit: UInt16) {
        let digits = String(unit, radix: 16, uppercase: true)
        append("\\u" + String(repeating: "0", count: 4 - digits.count) + digits)
    }

    private mutating func append(_ text: String) {
        output.append(contentsOf: text.utf8)
    }
}
