extension JSONValue {
    /// The value as text: on one line, or indented by four spaces a level.
    public func text(pretty: Bool = false) -> String {
        var result = ""
        write(to: &result, pretty: pretty, level: 0)
        return result
    }

    private func write(to result: inout String, pretty: Bool, level: Int) {
        switch self {
        case .null: result += "null"
        case .bool(let value): result += value ? "true" : "false"
        case .integer(let value): result += String(value)
        case .unsigned(let value): result += String(value)
        case .double(let value): result += value.isFinite ? String(value) : "null"
        case .string(let value): Self.quote(value, to: &result)
        case .array(let values):
            Self.container("[", "]", count: values.count, to: &result, pretty, level) {
                index, result in
                values[index].write(to: &result, pretty: pretty, level: level + 1)
            }
        case .object(let object):
            Self.container("{", "}", count: object.count, to: &result, pretty, level) {
                index, result in
                Self.quote(object.members[index].key, to: &result)
                result += ": "
                object.members[index].value.write(to: &result, pretty: pretty, level: level + 1)
            }
        }
    }

    private static func container(
        _ open: String, _ close: String, count: Int, to result: inout String, _ pretty: Bool,
        _ level: Int, _ member: (Int, inout String) -> Void
    ) {
        result += open
        for index in 0..<count {
            if index > 0 { result += pretty ? "," : ", " }
            if pretty { result += "\n" + String(repeating: "    ", count: level + 1) }
            member(index, &result)
        }
        if pretty, count > 0 { result += "\n" + String(repeating: "    ", count: level) }
        result += close
    }

    private static func quote(_ text: String, to result: inout String) {
        result += "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": result += "\\\""
            case "\\": result += "\\\\"
            case "\n": result += "\\n"
            case "\r": result += "\\r"
            case "\t": result += "\\t"
            case _ where scalar.value < 0x20 || scalar.value == 0x7f:
                let digits = String(scalar.value, radix: 16)
                result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: result.unicodeScalars.append(scalar)
            }
        }
        result += "\""
    }
}
