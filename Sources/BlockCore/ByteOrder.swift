// Integers in memory, in a stated byte order. Offsets are checked: these serve parsers.

extension UnsafeRawBufferPointer {
    /// The big-endian integer at `offset`; a caller's out-of-bounds offset traps.
    @inlinable @inline(__always)
    public func bigEndian<T: FixedWidthInteger>(at offset: Int, as type: T.Type = T.self) -> T {
        T(bigEndian: loadUnaligned(fromByteOffset: offset, as: T.self))
    }

    /// The little-endian integer at `offset`; a caller's out-of-bounds offset traps.
    @inlinable @inline(__always)
    public func littleEndian<T: FixedWidthInteger>(at offset: Int, as type: T.Type = T.self) -> T {
        T(littleEndian: loadUnaligned(fromByteOffset: offset, as: T.self))
    }
}

extension UnsafeMutableRawBufferPointer {
    /// Stores `value` in big-endian order; a caller's out-of-bounds offset traps.
    @inlinable @inline(__always)
    public func storeBigEndian<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        storeBytes(of: value.bigEndian, toByteOffset: offset, as: T.self)
    }

    /// Stores `value` in little-endian order; a caller's out-of-bounds offset traps.
    @inlinable @inline(__always)
    public func storeLittleEndian<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        storeBytes(of: value.littleEndian, toByteOffset: offset, as: T.self)
    }
}
