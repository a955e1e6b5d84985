/// Text that grows byte by byte, for output of a million short lines, where a `String` for each would be
/// most of the work.
public struct OutputText: Sendable {
    public private(set) var bytes: [UInt8] = []

    public init() {}

    public mutating func append(_ text: String) {
        var text = text
        text.withUTF8 { bytes.append(contentsOf: $0) }
    }

    /// Appends a number, as `String(value)` writes it.
    public mutating func append(_ value: Int) {
        var low = bytes.count
        var rest = value.magnitude
        repeat {
            bytes.append(UInt8(ascii: "0") + UInt8(truncatingIfNeeded: rest % 10))
            rest /= 10
        } while rest > 0
        if value < 0 { bytes.append(UInt8(ascii: "-")) }
        // The digits came from the last to the first. Reversing a slice would copy it.
        var high = bytes.count - 1
        while low < high {
            bytes.swapAt(low, high)
            low += 1
            high -= 1
        }
    }

    public mutating func append(_ value: Bool) {
        append(value ? "true" : "false")
    }

    /// Keeps the memory for what comes next.
    public mutating func removeAll() {
        bytes.removeAll(keepingCapacity: true)
    }
}
