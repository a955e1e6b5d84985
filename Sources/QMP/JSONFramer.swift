import BlockCore

/// Cuts a stream of bytes into JSON documents: objects and arrays, one after the other, with or
/// without line ends between.
///
/// Only brackets and strings are looked at; whether a piece is JSON is for ``JSONParser`` to say.
public struct JSONFramer {
    public enum Piece: Equatable {
        /// A whole document.
        case document([UInt8])
        /// Bytes that begin no document, or one that is too long, up to where reading goes on.
        case garbage(String)
    }

    private var pending: [UInt8] = []
    private var depth = 0
    private var quote: UInt8?
    private var isEscaped = false
    /// The rest of a line is dropped: what came before it was no JSON.
    private var isDropping = false

    public init() {}

    /// Takes bytes; gives back what they complete.
    public mutating func receive(_ bytes: some Sequence<UInt8>) -> [Piece] {
        var result: [Piece] = []
        for byte in bytes {
            if let piece = receive(byte) { result.append(piece) }
        }
        return result
    }

    private mutating func receive(_ byte: UInt8) -> Piece? {
        if isDropping {
            isDropping = byte != 0x0a
            return nil
        }
        if depth == 0 { return begin(byte) }
        pending.append(byte)
        guard pending.count <= Limits.jsonBytesMax else {
            reset()
            isDropping = true
            return .garbage("a document is longer than \(Limits.jsonBytesMax) bytes")
        }
        if let open = quote {
            if isEscaped {
                isEscaped = false
            } else if byte == UInt8(ascii: "\\") {
                isEscaped = true
            } else if byte == open {
                quote = nil
            }
            return nil
        }
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "'"): quote = byte
        case UInt8(ascii: "{"), UInt8(ascii: "["): depth += 1
        case UInt8(ascii: "}"), UInt8(ascii: "]"):
            depth -= 1
            if depth == 0 {
                let document = pending
                reset()
                return .document(document)
            }
        default: break
        }
        return nil
    }

    private mutating func begin(_ byte: UInt8) -> Piece? {
        switch byte {
        case 0x20, 0x09, 0x0a, 0x0d: return nil
        case UInt8(ascii: "{"), UInt8(ascii: "["):
            pending = [byte]
            depth = 1
            return nil
        // A client that resynchronises sends 0xff first.
        case 0xff: return nil
        default:
            isDropping = true
            return .garbage("expected an object")
        }
    }

    private mutating func reset() {
        pending = []
        depth = 0
        quote = nil
        isEscaped = false
    }
}
