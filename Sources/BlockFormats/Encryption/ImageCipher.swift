import BlockCore
import BlockCrypto
import BlockIO

/// Encrypts and decrypts the data of requests: small ones where they are, large ones on the worker
/// threads of all processors.
struct ImageCipher: Sendable {
    /// Up to here a hop to another thread costs more than the work.
    static let inlineBytesMax = 8 << 10
    /// What one worker takes at a time.
    static let pieceBytes = 64 << 10
    static let sectorSize = SectorCipher.sectorSize

    private let sectors: SectorCipher
    private let seat: IOSeat

    init(_ sectors: SectorCipher, on seat: IOSeat) {
        self.sectors = sectors
        self.seat = seat
    }

    /// Decrypts whole sectors in place; the first is at byte `offset`, which gives its number.
    func decrypt(_ vector: IOVector, at offset: Int) async throws(BlockError) {
        if let slice = vector.single {
            try await run(offset, slice.count) { [sectors] start, count throws(BlockError) in
                try sectors.decrypt(
                    slice.slice(start, count).bytes, sector: Self.number(offset + start))
            }
            return
        }
        // Sectors may lie across the parts of scattered memory.
        let whole = try IOVector(allocating: vector.count)
        whole.copy(from: vector)
        try await decrypt(whole, at: offset)
        vector.copy(from: whole)
    }

    /// The same data encrypted, in memory of its own: the caller's is not touched.
    func encrypted(_ vector: IOVector, at offset: Int) async throws(BlockError) -> IOVector {
        let output = try IOBuffer(count: vector.count).prefix(vector.count)
        var input = output
        if let single = vector.single {
            input = single
        } else {
            vector.copy(to: output.bytes)
        }
        let source = input
        try await run(offset, vector.count) { [sectors] start, count throws(BlockError) in
            try sectors.encrypt(
                UnsafeRawBufferPointer(source.slice(start, count).bytes),
                into: output.slice(start, count).bytes, sector: Self.number(offset + start))
        }
        return IOVector(output)
    }

    private static func number(_ offset: Int) -> UInt64 { UInt64(offset / sectorSize) }

    /// Calls `work` for pieces of `count` bytes.
    private func run(
        _ offset: Int, _ count: Int,
        _ work: @escaping @Sendable (_ start: Int, _ count: Int) throws(BlockError) -> Void
    ) async throws(BlockError) {
        precondition((offset | count).isAligned(to: Self.sectorSize))
        if count <= Self.inlineBytesMax {
            try work(0, count)
            return
        }
        let failures = FirstFailure()
        await seat.thread.offload(sharing: (count - 1) / Self.pieceBytes + 1) { next in
            while let piece = next() {
                let start = piece * Self.pieceBytes
                do throws(BlockError) {
                    try work(start, min(Self.pieceBytes, count - start))
                } catch {
                    failures.note(error)
                }
            }
        }
        if let failure = failures.first { throw failure }
    }
}
