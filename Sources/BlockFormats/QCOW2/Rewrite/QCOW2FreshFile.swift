import BlockCore
import BlockGraph

/// The file of an image that is written anew, front to back. Confined to the graph's thread.
///
/// ```
/// header │ whatever is taken, in the order in which it is taken │ refcount blocks │ refcount table │
/// ```
/// Invariants:
/// 1. Every cluster below `clusterCount` was taken, with the count of references that it has in the end.
/// 2. Nothing is given back, and nothing is written twice: what nobody wrote is a hole, and reads as zeroes.
final class QCOW2FreshFile: @unchecked Sendable {
    private let file: Edge
    private let geometry: QCOW2.Geometry
    /// Where it gives up: more than this is no gain.
    private let clusterCountMax: Int
    private(set) var clusterCount = 0
    /// Was asked for more than `clusterCountMax`.
    private(set) var isTooLarge = false
    /// Refcount blocks, as they will be in the file.
    private var blocks: [[UInt8]] = []
    /// Where the next compressed cluster may go: behind the last one.
    private var packedEnd: Int?

    init(_ file: Edge, _ geometry: QCOW2.Geometry, clusterCountMax: Int) {
        self.file = file
        self.geometry = geometry
        self.clusterCountMax = clusterCountMax
    }

    private var bits: Int { geometry.clusterBits }

    // MARK: Room

    /// Takes clusters that follow each other.
    ///
    /// - Returns: where the first is in the file.
    /// - Throws: `noSpace` past `clusterCountMax`, and sets ``isTooLarge``.
    func take(_ count: Int, references: UInt64 = 1) throws(BlockError) -> Int {
        guard count <= clusterCountMax - clusterCount else {
            isTooLarge = true
            throw BlockError(.noSpace, "the new image would be no smaller than the old one")
        }
        let first = clusterCount
        clusterCount += count
        for cluster in first..<clusterCount { try add(references, to: cluster) }
        return first << bits
    }

    /// Takes room for a compressed cluster of `count` bytes, less than a cluster has.
    func pack(_ count: Int, references: UInt64) throws(BlockError) -> QCOW2Refcounts.Place {
        if let start = packedEnd, let place = try packBehind(start, count, references) {
            return place
        }
        let start = try take(1, references: references)
        return place(start, count)
    }

    /// Behind the compressed cluster before, where its host cluster has room and can count it too.
    private func packBehind(
        _ start: Int, _ count: Int, _ references: UInt64
    ) throws(BlockError) -> QCOW2Refcounts.Place? {
        let cluster = start >> bits
        guard let sum = self.references(of: cluster).adding(references), sum <= geometry.refcountMax
        else { return nil }
        if start + count > (cluster + 1) << bits {
            guard cluster + 1 == clusterCount else { return nil }
            _ = try take(1, references: references)
        }
        try add(references, to: cluster)
        return place(start, count)
    }

    private func place(_ start: Int, _ count: Int) -> QCOW2Refcounts.Place {
        let end = start + count
        packedEnd = end.isAligned(to: geometry.clusterSize) ? nil : end
        return QCOW2Refcounts.Place(start, count, clusterBits: bits)
    }

    // MARK: Counts

    private func references(of cluster: Int) -> UInt64 {
        let block = cluster >> geometry.refcountBlockBits
        let index = cluster & (geometry.clustersPerRefcountBlock - 1)
        return blocks[block].withUnsafeBytes {
            QCOW2.Refcount.get($0, index, order: geometry.refcountOrder)
        }
    }

    private func add(_ references: UInt64, to cluster: Int) throws(BlockError) {
        let block = cluster >> geometry.refcountBlockBits
        while blocks.count <= block {
            blocks.append([UInt8](repeating: 0, count: geometry.clusterSize))
        }
        guard let sum = self.references(of: cluster).adding(references), sum <= geometry.refcountMax
        else {
            throw BlockError(
                .corrupt, "a cluster has more references than refcounts of this width can count",
                remedy: "check the image")
        }
        let index = cluster & (geometry.clustersPerRefcountBlock - 1)
        blocks[block].withUnsafeMutableBytes {
            QCOW2.Refcount.set($0, index, to: sum, order: geometry.refcountOrder)
        }
    }

    // MARK: Writing

    /// Writes to what was taken. From one task only, as it may let the file grow.
    func write(_ offset: Int, from vector: IOVector) async throws(BlockError) {
        try await grow()
        try await file.write(offset, from: vector)
    }

    /// Writes to what was there at the last ``grow()``: from any number of tasks.
    func writeGrown(_ offset: Int, from vector: IOVector) async throws(BlockError) {
        try await file.write(offset, from: vector)
    }

    /// Writes tables; what lacks of their last cluster stays a hole, and so does a table of zeroes.
    func write(_ offset: Int, _ words: [UInt64]) async throws(BlockError) {
        if words.allSatisfy({ $0 == 0 }) { return }
        let bytes = QCOW2Refcounts.bigEndian(words[...])
        try await write(offset, from: try QCOW2Image.vector(bytes))
    }

    /// Lets the file reach past all that was taken.
    ///
    /// In steps, of which the last is taken back in the end: growing waits for writes in flight.
    func grow() async throws(BlockError) {
        let end = clusterCount << bits
        guard end > file.size else { return }
        let step = min(max(1 << 20, file.size / 4), 256 << 20)
        try await file.resize(to: end + step)
    }

    /// Writes the counts, their own included, and the header last. All is durable on return.
    func finish(_ header: QCOW2.Header) async throws(BlockError) {
        var header = header
        let first = clusterCount
        var blockCount = 0
        var tableClusters = 0
        // They count themselves: take until all have a count.
        while blockCount < blocks.count
            || tableClusters < geometry.clusterCount(for: blockCount * 8)
        {
            if blockCount < blocks.count {
                blockCount += 1
            } else {
                tableClusters += 1
            }
            _ = try take(1)
        }
        guard tableClusters <= max(1, QCOW2.Limit.refcountTableBytesMax >> bits) else {
            throw BlockError(.noSpace, "the refcount table would be above 8 MiB")
        }
        for (index, block) in blocks.enumerated() {
            try await write((first + index) << bits, from: try QCOW2Image.vector(block))
        }
        header.refcountTableOffset = (first + blockCount) << bits
        header.refcountTableClusters = tableClusters
        try await write(
            header.refcountTableOffset, (0..<blockCount).map { UInt64((first + $0) << bits) })
        try await write(0, from: try QCOW2Image.vector(try header.serialised()))
        try await file.resize(to: clusterCount << bits)
        try await file.flush()
    }
}
