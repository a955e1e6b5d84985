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
}
