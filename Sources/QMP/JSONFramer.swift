import BlockCore

/// Cuts a stream of bytes into JSON documents, with or without newlines between them.
///
/// What is broken is reported once, and reading goes on with the next document: after a control
/// character or a byte 0xFF, which no JSON contains and which a client may send on purpose to start
/// afresh; otherwise after the end of the line, or at the next `{` outside a document.
public struct JSONFramer: Sendable {
    private enum State {
        /// Between documents.
        case between
        /// In a document, outside strings.
        case inside
        /// In a string that ends with `quote`.
        case string(quote: UInt8)
        /// Behind a backslash in a string.
        case escape(quote: UInt8)
        /// Skipping what follows an error, up to the end of the line or, where `orBrace`, a brace.
        case skipping(orBrace: Bool)
    }

    private var state = State.between
    private var depth = 0
    private var document: [UInt8] = []

    public init() {}

    /// Whether a document has begun and not ended.
    public var isInDocument: Bool { depth > 0 }

    /// Takes `byte`.
    ///
    /// - Returns: the document or the error that is complete with it.
    public mutating func take(_ byte: UInt8) -> Result<JSONValue, BlockError>? {
        if byte == 0xff {
            reset(.between)
            return .failure(Self.error("byte 0xff"))
        }
        switch state {
        case .between: return begin(byte)
        case .inside: return takeInside(byte)
        case .string(let quote):
            if byte < 0x20 { return fail("control character in a string", .between) }
            if byte == UInt8(ascii: "\\") {
                state = .escape(quote: quote)
            } else if byte == quote {
                state = .inside
            }
            return keep(byte)
        case .escape(let quote):
            if byte < 0x20 { return fail("control character in a string", .between) }
            state = .string(quote: quote)
            return keep(byte)
        case .skipping(let orBrace):
            if byte == 0x0a {
                state = .between
            } else if orBrace, byte == UInt8(ascii: "{") {
                return begin(byte)
            }
            return nil
        }
    }

    private mutating func begin(_ byte: UInt8) -> Result<JSONValue, BlockError>? {
        switch byte {
        case 0x20, 0x09, 0x0a, 0x0d: return nil
        case UInt8(ascii: "{"), UInt8(ascii: "["):
            state = .inside
            depth = 1
            document = [byte]
            return nil
        default:
            return fail("expected an object", .skipping(orBrace: true))
        }
    }

    private mutating func takeInside(_ byte: UInt8) -> Result<JSONValue, BlockError>? {
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "'"):
            state = .string(quote: byte)
        case UInt8(ascii: "{"), UInt8(ascii: "["):
            depth += 1
            guard depth <= Limits.jsonDepthMax else {
                return fail(
                    "nested deeper than \(Limits.jsonDepthMax)", .skipping(orBrace: false))
            }
        case UInt8(ascii: "}"), UInt8(ascii: "]"):
            depth -= 1
            if depth == 0 { return finish(byte) }
        case 0x09, 0x0a, 0x0d: break
        case 0..<0x20: return fail("control character", .skipping(orBrace: true))
        default: break
        }
        return keep(byte)
    }

    private mutating func keep(_ byte: UInt8) -> Result<JSONValue, BlockError>? {
        guard document.count < Limits.jsonBytesMax else {
            return fail(
                "longer than \(Limits.jsonBytesMax) bytes", .skipping(orBrace: false))
        }
        document.append(byte)
        return nil
    }

    private mutating func finish(_ last: UInt8) -> Result<JSONValue, BlockError>? {
        let bytes = document + [last]
        reset(.between)
        do throws(BlockError) {
            return .success(try JSONParser.parse(bytes))
        } catch {
            return .failure(error)
        }
    }

    private mutating func fail(
        _ reason: String, _ next: State
    ) -> Result<JSONValue, BlockError>? {
        reset(next)
        return .failure(Self.error(reason))
    }

    private mutating func reset(_ next: State) {
        state = next
        depth = 0
        document = []
    }

    private static func error(_ reason: String) -> BlockError {
        BlockError(.invalidArgument, "JSON parse error: \(reason)")
    }
}
