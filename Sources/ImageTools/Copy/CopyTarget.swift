import BlockCore
import BlockGraph

/// Where a copy goes, and how its zeroes get there. Confined to the session's thread.
final class CopyTarget: @unchecked Sendable {
    let edge: Edge
    /// Reads as zeroes wherever this copy wrote nothing: zeroes need no writing.
    let isZero: Bool
    /// Runs of zeroes of this many bytes in data become holes; 0: all is written as data.
    let sparseBytes: Int
    /// Space that is reserved stays so under zeroes.
    private let keepsAllocation: Bool
    /// How data is written.
    private let flags: WriteFlags
    /// Zeroes on a target that had other data go in pieces of this.
    private static let zeroBytesMax = 1 << 30
    private static let fillBytes = 2 << 20
    private var zeroes: IOVector?

    init(
        _ edge: Edge, isZero: Bool, sparseBytes: Int, keepsAllocation: Bool = false,
        _ flags: WriteFlags = []
    ) {
        self.edge = edge
        self.flags = flags
        self.isZero = isZero
        self.sparseBytes = sparseBytes
        self.keepsAllocation = keepsAllocation
    }

    /// Writes data, leaving out what is zeroes.
    func write(_ range: ByteRange, from vector: IOVector) async throws(BlockError) {
        guard sparseBytes > 0, let slice = vector.single else {
            try await edge.write(range.offset, from: vector, flags)
            return
        }
        let phase = range.offset % sparseBytes
        var done = 0
        while done < vector.count {
            let run = ZeroDetection.run(
                in: UnsafeRawBufferPointer(slice.bytes), from: done, unit: sparseBytes,
                phase: phase)
            let part = ByteRange(from: range.offset + done, to: range.offset + run.end)
            if run.isZero {
                try await zero(part)
            } else {
                try await edge.write(part.offset, from: vector.slice(done, part.count), flags)
            }
            done = run.end
        }
    }

    /// Makes a range read as zeroes.
    func zero(_ range: ByteRange) async throws(BlockError) {
        if sparseBytes == 0 { return try await fill(range) }
        if isZero { return }
        var offset = range.offset
        while offset < range.end {
            let count = min(range.end - offset, Self.zeroBytesMax)
            try await edge.writeZeroes(ByteRange(offset, count), keepsAllocation ? [] : .mayUnmap)
            offset += count
        }
    }

    /// Writes zeroes as if they were data: the target is to be fully allocated.
    private func fill(_ range: ByteRange) async throws(BlockError) {
        let buffer: IOVector
        if let zeroes {
            buffer = zeroes
        } else {
            buffer = try IOVector(allocating: Self.fillBytes)
            buffer.fill(0)
            zeroes = buffer
        }
        var offset = range.offset
        while offset < range.end {
            let count = min(range.end - offset, buffer.count)
            try await edge.write(offset, from: buffer.slice(0, count), flags)
            offset += count
        }
    }
}

extension Edge {
    /// Whether all of the node is known to read as zeroes, its backing images included.
    func isKnownZero() async throws(BlockError) -> Bool {
        var offset = 0
        let walk = StatusWalk(self)
        while offset < size {
            let status = try await walk.run(at: offset, limit: size)
            if !status.flags.contains(.zero) { return false }
            offset += status.count
        }
        return true
    }
}
