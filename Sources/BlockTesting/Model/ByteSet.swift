/// A set of byte values.
public struct ByteSet: Hashable, Sendable {
    private var bits: SIMD4<UInt64> = .zero

    public init() {}

    public init(_ value: UInt8) {
        insert(value)
    }

    public static let all: ByteSet = {
        var set = ByteSet()
        set.bits = .init(repeating: ~0)
        return set
    }()

    public mutating func insert(_ value: UInt8) {
        bits[Int(value >> 6)] |= 1 << UInt64(value & 63)
    }

    public func contains(_ value: UInt8) -> Bool {
        bits[Int(value >> 6)] & (1 << UInt64(value & 63)) != 0
    }

    public func union(_ other: ByteSet) -> ByteSet {
        var result = self
        result.bits = bits | other.bits
        return result
    }

    public func intersection(_ other: ByteSet) -> ByteSet {
        var result = self
        result.bits = bits & other.bits
        return result
    }

    public var count: Int {
        (0..<4).reduce(0) { $0 + bits[$1].nonzeroBitCount }
    }

    /// The only value, where there is exactly one.
    public var single: UInt8? {
        guard count == 1 else { return nil }
        for index in 0..<4 where bits[index] != 0 {
            return UInt8(index * 64 + bits[index].trailingZeroBitCount)
        }
        return nil
    }
}

extension ByteSet: CustomStringConvertible {
    public var description: String {
        let values = (0...255).filter { contains(UInt8($0)) }
        if values.count > 16 { return "{\(values.count) values}" }
        return "{\(values.map(String.init).joined(separator: ", "))}"
    }
}
