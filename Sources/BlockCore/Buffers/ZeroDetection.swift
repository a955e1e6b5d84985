/// Finding zeroes fast.
public enum ZeroDetection {
    /// Whether every byte is zero. An empty buffer is.
    ///
    /// Looks at the first, middle and last bytes before it reads the rest, 64 bytes a step.
    public static func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
        let count = bytes.count
        guard count > 0, let base = bytes.baseAddress else { return true }
        if bytes[0] != 0 || bytes[count - 1] != 0 || bytes[count / 2] != 0 { return false }
        var offset = 0
        while offset <= count - 64 {
            let block = base.loadUnaligned(fromByteOffset: offset, as: SIMD8<UInt64>.self)
            if block != .zero { return false }
            offset += 64
        }
        while offset < count {
            if bytes[offset] != 0 { return false }
            offset += 1
        }
        return true
    }

    /// How far bytes from `start` on are alike: units that are all zero, or units that are not.
    ///
    /// - Parameters:
    ///   - unit: zeroes count in whole units of so many bytes; the last unit may be shorter.
    ///   - phase: where in a unit the first of `bytes` lies.
    /// - Returns: what the run is, and where it ends: at most `bytes.count`.
    public static func run(
        in bytes: UnsafeRawBufferPointer, from start: Int, unit: Int, phase: Int = 0
    ) -> (isZero: Bool, end: Int) {
        precondition(start >= 0 && start < bytes.count && unit > 0 && phase >= 0)
        func unitEnd(_ offset: Int) -> Int {
            min(bytes.count, offset + unit - (offset + phase) % unit)
        }
        var end = unitEnd(start)
        let isZero = isZero(UnsafeRawBufferPointer(rebasing: bytes[start..<end]))
        while end < bytes.count {
            let next = unitEnd(end)
            if Self.isZero(UnsafeRawBufferPointer(rebasing: bytes[end..<next])) != isZero { break }
            end = next
        }
        return (isZero, end)
    }
}
