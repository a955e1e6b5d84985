import BlockCore

/// The exerciser's result lines, laid out as scripts read them.
enum ExerciserReport {
    /// `value` rounded to `places` decimals; halfway between two, to the even one.
    static func fixed(_ value: Double, _ places: Int) -> String {
        var scale = 1.0
        for _ in 0..<places { scale *= 10 }
        let product = value * scale
        var scaled = product.rounded(.toNearestOrEven)
        // What the product was rounded by decides where it is just between two.
        let rest = (-product).addingProduct(value, scale)
        if (product - product.rounded(.down)) == 0.5, rest != 0 {
            scaled = product.rounded(rest > 0 ? .up : .down)
        }
        guard scaled.isFinite, let whole = Int(exactly: scaled) else { return "inf" }
        let digits = String(whole.magnitude)
        let padded = String(repeating: "0", count: max(0, places + 1 - digits.count)) + digits
        let sign = whole < 0 ? "-" : ""
        if places == 0 { return sign + padded }
        return "\(sign)\(padded.dropLast(places)).\(padded.suffix(places))"
    }

    /// Bytes with a unit and up to three decimals: `9.938 MiB`, `64 bytes`.
    static func bytes(_ value: Double) -> String {
        let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
        var rest = value
        var unit = 0
        while rest >= 1024, unit < units.count - 1 {
            rest /= 1024
            unit += 1
        }
        let text = fixed(rest, 3)
        return (text.hasSuffix(".000") ? String(text.dropLast(4)) : text) + " " + units[unit]
    }

    static func bytes(_ value: Int) -> String { bytes(Double(value)) }

    /// What a finished request did, in two lines; or in one of numbers for programs (`-C`).
    static func operation(
        _ verb: String, offset: Int, count: Int, nanoseconds: UInt64, forPrograms: Bool
    ) -> String {
        let seconds = Double(max(nanoseconds, 1)) / 1e9
        let rate = Double(count) / seconds
        if forPrograms {
            let time = clock(nanoseconds, always: true)
            return "\(count),1,\(time),\(fixed(rate, 3)),\(fixed(1 / seconds, 3))\n"
        }
        return "\(verb) \(count)/\(count) bytes at offset \(offset)\n"
            + "\(bytes(count)), 1 ops; \(clock(nanoseconds, always: false)) "
            + "(\(bytes(rate))/sec and \(fixed(1 / seconds, 4)) ops/sec)\n"
    }

    /// `00.25 sec`, or with minutes and hours `0:01:02.25`.
    private static func clock(_ nanoseconds: UInt64, always: Bool) -> String {
        let hundredths = Int(clamping: nanoseconds / 10_000_000)
        let seconds = hundredths / 100
        let tail = "\(two(seconds % 60)).\(two(hundredths % 100))"
        if !always, seconds < 60 { return "\(tail) sec" }
        return "\(seconds / 3600):\(two(seconds / 60 % 60)):\(tail)"
    }

    private static func two(_ number: Int) -> String {
        (number < 10 ? "0" : "") + String(number)
    }

    /// Whether a dump shows a byte as a character: letters and digits only, as scripts expect.
    private static func isShown(_ byte: UInt8) -> Bool {
        let character = Character(Unicode.Scalar(byte))
        return character.isASCII && (character.isLetter || character.isNumber)
    }

    /// Bytes in hexadecimal and as characters, sixteen a line.
    static func dump(_ vector: IOVector, offset: Int) -> String {
        let bytes = vector.array
        var text = ""
        for start in stride(from: 0, to: bytes.count, by: 16) {
            let row = bytes[start..<min(start + 16, bytes.count)]
            let place = String(offset + start, radix: 16)
            text += String(repeating: "0", count: max(0, 8 - place.count)) + place + ":  "
            for byte in row {
                text += (byte < 16 ? "0" : "") + String(byte, radix: 16) + " "
            }
            text += " "
            for byte in row {
                text.unicodeScalars.append(isShown(byte) ? Unicode.Scalar(byte) : ".")
            }
            text += "\n"
        }
        return text
    }
}
