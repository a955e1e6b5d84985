import BlockCore

/// Builds option replies: big-endian integers and bytes, appended.
struct NBDWriter {
    private(set) var bytes: [UInt8] = []

    mutating func append(_ value: some FixedWidthInteger) {
        withUnsafeBytes(of: value.bigEndian) { bytes.append(contentsOf: $0) }
    }

    mutating func append(_ text: String) {
        bytes.append(contentsOf: text.utf8)
    }

    mutating func append(zeroes count: Int) {
        bytes.append(contentsOf: repeatElement(0, count: count))
    }

    /// The header of an option reply (proto.md, "Option haggling"): magic, option, type, length.
    mutating func appendReply(to option: UInt32, _ type: NBDOptionReply, count: Int) {
        append(NBDMagic.optionReply)
        append(option)
        append(type.rawValue)
        append(UInt32(count))
    }

    /// An option reply whose data is a text for people.
    mutating func appendReply(to option: UInt32, _ type: NBDOptionReply, text: String = "") {
        let text = text.cut(toBytes: NBDLimits.stringBytesMax)
        appendReply(to: option, type, count: text.utf8.count)
        append(text)
    }
}

/// Reads the data of an option: every read is checked against its end.
struct NBDReader {
    private var rest: ArraySlice<UInt8>

    init(_ bytes: ArraySlice<UInt8>) {
        rest = bytes
    }

    var isAtEnd: Bool { rest.isEmpty }

    /// The next big-endian integer, or `nil` at the end.
    mutating func integer<T: FixedWidthInteger>(_ type: T.Type = T.self) -> T? {
        let count = MemoryLayout<T>.size
        guard rest.count >= count else { return nil }
        let value = rest.withUnsafeBytes { $0.bigEndian(at: 0, as: T.self) }
        rest = rest.dropFirst(count)
        return value
    }

    /// The next `count` bytes, or `nil` when there are fewer.
    mutating func bytes(_ count: UInt32) -> ArraySlice<UInt8>? {
        guard let count = Int(exactly: count), count <= rest.count else { return nil }
        let result = rest.prefix(count)
        rest = rest.dropFirst(count)
        return result
    }
}

extension String {
    /// The longest beginning of whole characters within `count` UTF-8 bytes.
    func cut(toBytes count: Int) -> String {
        guard utf8.count > count else { return self }
        var end = utf8.index(startIndex, offsetBy: count)
        while end > startIndex {
            if let index = end.samePosition(in: unicodeScalars) {
                return String(self[..<index])
            }
            end = utf8.index(before: end)
        }
        return ""
    }
}
