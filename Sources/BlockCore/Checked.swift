// Checked arithmetic. In Swift an overflow traps, and a trap on a number from an image, a socket or
// a user is a remote abort: such numbers go through these.

extension FixedWidthInteger {
    /// `self + other`, or `nil` on overflow.
    @inlinable @inline(__always)
    public func adding(_ other: Self) -> Self? {
        let (result, overflow) = addingReportingOverflow(other)
        return overflow ? nil : result
    }

    /// `self - other`, or `nil` on overflow.
    @inlinable @inline(__always)
    public func subtracting(_ other: Self) -> Self? {
        let (result, overflow) = subtractingReportingOverflow(other)
        return overflow ? nil : result
    }

    /// `self * other`, or `nil` on overflow.
    @inlinable @inline(__always)
    public func multiplied(by other: Self) -> Self? {
        let (result, overflow) = multipliedReportingOverflow(by: other)
        return overflow ? nil : result
    }
}

extension BinaryInteger where Self: FixedWidthInteger {
    /// The largest multiple of `alignment` that is not above `self`. `alignment` is a power of two.
    @inlinable @inline(__always)
    public func roundedDown(to alignment: Self) -> Self {
        self & ~(alignment &- 1)
    }

    /// The smallest multiple of `alignment` that is not below `self`, or `nil` on overflow.
    /// `alignment` is a power of two.
    @inlinable @inline(__always)
    public func roundedUp(to alignment: Self) -> Self? {
        adding(alignment &- 1).map { $0 & ~(alignment &- 1) }
    }

    /// Whether `self` is a multiple of `alignment`, a power of two.
    @inlinable @inline(__always)
    public func isAligned(to alignment: Self) -> Bool {
        self & (alignment &- 1) == 0
    }

    /// Whether `self` is a power of two: 1, 2, 4…
    @inlinable @inline(__always)
    public var isPowerOfTwo: Bool {
        self > 0 && self & (self &- 1) == 0
    }
}
