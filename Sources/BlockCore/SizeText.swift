// Sizes as people write and read them.

/// A size as users write it: a number, then `b`, `k`, `K`, `M`, `G`, `T`, `P` or `E` (powers of 1024).
public enum SizeText {
    /// Parses `"4096"`, `"64k"`, `"1.5G"`, `"0x1000"`; spaces and one `+` may stand in front.
    ///
    /// - Returns: bytes, or `nil` when the text is no size, is negative or does not fit.
    public static func parse(_ given: some StringProtocol) -> Int? {
        var text = given.drop { $0.isASCII && $0.isWhitespace }
        if text.first == "+" { text = text.dropFirst() }
        if text.hasPrefix("0x") || text.hasPrefix("0X") {
            let digits = text.dropFirst(2)
            guard digits.first != "+", digits.first != "-" else { return nil }
            return Int(digits, radix: 16)
        }
        var digits = text[...]
        var unit = 1
        if let last = digits.last, let shift = shift(of: last) {
            unit = 1 << shift
            digits = digits.dropLast()
        }
        guard let first = digits.utf8.first, first >= 0x30, first <= 0x39 else { return nil }
        let parts = digits.split(separator: ".", maxSplits: 1, omittingEmptySubsequences: false)
        guard let whole = Int(parts[0]), let bytes = whole.multiplied(by: unit) else { return nil }
        guard parts.count == 2 else { return bytes }
        // A fraction needs a unit to be a whole number of bytes.
        guard unit > 1, let fraction = fraction(of: parts[1], unit: unit) else { return nil }
        return bytes.adding(fraction)
    }

    private static func shift(of suffix: Character) -> Int? {
        switch suffix {
        case "b", "B": 0
        case "k", "K": 10
        case "m", "M": 20
        case "g", "G": 30
        case "t", "T": 40
        case "p", "P": 50
        case "e", "E": 60
        default: nil
        }
    }

    private static func fraction(of digits: some StringProtocol, unit: Int) -> Int? {
        guard !digits.isEmpty, digits.utf8.allSatisfy({ $0 >= 0x30 && $0 <= 0x39 }),
            let value = Double("0." + String(digits))
        else { return nil }
        return Int(value * Double(unit))
    }

    /// A size as people read it, to three digits: `512 B`, `1.5 GiB`, `64 KiB`.
    public static func format(_ bytes: Int) -> String {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
        var value = Double(bytes.magnitude)
        var index = 0
        while value >= 1000, index < units.count - 1 {
            value /= 1024
            index += 1
        }
        let sign = bytes < 0 ? "-" : ""
        return "\(sign)\(threeDigits(value)) \(units[index])"
    }

    /// `value` with three significant digits and no trailing zeros, as `%0.3g` prints it.
    static func threeDigits(_ value: Double) -> String {
        let scale: Double = value < 1 ? 1000 : value < 10 ? 100 : value < 100 ? 10 : 1
        let scaled = Int((value * scale).rounded(.toNearestOrEven))
        let whole = scaled / Int(scale)
        var fraction = scaled % Int(scale)
        guard fraction != 0 else { return "\(whole)" }
        var width = scale == 1000 ? 3 : scale == 100 ? 2 : 1
        while fraction % 10 == 0 {
            fraction /= 10
            width -= 1
        }
        let digits = String(fraction)
        return "\(whole)." + String(repeating: "0", count: width - digits.count) + digits
    }
}
