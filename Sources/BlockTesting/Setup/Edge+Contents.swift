import BlockCore
import BlockGraph

extension Edge {
    /// Writes one byte all over a range.
    public func fill(
        _ range: ByteRange, with byte: UInt8, _ flags: WriteFlags = []
    ) async throws(BlockError) {
        let data = try IOVector(allocating: range.count)
        data.fill(byte)
        try await write(range.offset, from: data, flags)
    }

    /// The bytes of a range.
    public func contents(of range: ByteRange) async throws(BlockError) -> [UInt8] {
        let data = try IOVector(allocating: range.count)
        try await read(range.offset, into: data)
        return data.array
    }
}
