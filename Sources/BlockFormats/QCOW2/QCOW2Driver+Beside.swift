import BlockCore
import BlockGraph
import BlockIO

// Small writes side by side: those to a cluster that another request is allocating right now.

/// Guest clusters whose entries one request is about to change. Confined to its thread.
///
/// ```
/// placing ──► reading ──► writing ──► ended      reading: the rest of the clusters, for the copy
/// ```
/// What another request may do with its bytes of these clusters meanwhile:
/// - where this one writes nothing (new clusters that read as zeroes): write them beside it;
/// - where this one copies, and has not begun to write: put them into the copy;
/// - else wait.
/// Its bytes count as written once the entries are linked. Should the allocation fail, it begins anew;
/// the clusters are not used again before that, for it counts as a request that knows them (`epochs`).
final class QCOW2Allocation: @unchecked Sendable {
    enum State { case placing, reading, writing, ended }

    var clusters: Range<Int>
    let slice: QCOW2TableCache.Slice
    let queue = WaitQueue()
    var state = State.placing
    /// The entries name the new clusters.
    var isLinked = false

    /// What to add to a guest offset for the offset in the file.
    private(set) var hostDifference = 0
    /// Guest bytes that this request writes, the copied rest included.
    private(set) var written = 0..<0
    /// Guest bytes that are allocated when it is done: whole clusters, or subclusters.
    var filled = 0..<0
    /// Guest bytes that it was asked to write.
    private(set) var data = 0..<0
    private var merged: [(offset: Int, vector: IOVector)] = []

    /// Keeps the slice of the entries in memory until the allocation ends.
    init(_ clusters: Range<Int>, in slice: QCOW2TableCache.Slice) {
        self.clusters = clusters
        self.slice = slice
        slice.pinCount += 1
    }

    /// The clusters are known: others need not wait any more to see what they may do.
    func place(host: Int, writes written: Range<Int>, data: Range<Int>) {
        hostDifference = host
        self.written = written
        self.data = data
        state = .reading
        queue.wakeAll()
    }

    /// What a request may do with bytes of these clusters.
    enum Way { case beside, merge, wait }

    func way(for range: Range<Int>) -> Way {
        switch state {
        case .placing, .ended: return .wait
        case .reading, .writing:
            if !range.overlaps(written) {
                // Other subclusters have yet to be allocated.
                let isFilled = filled.clamped(to: range) == range
                return isFilled ? .beside : .wait
            }
            return state == .reading && !range.overlaps(data) && written.clamped(to: range) == range
                ? .merge : .wait
        }
    }

    func merge(_ offset: Int, _ vector: IOVector) {
        merged.append((offset, vector))
    }

    /// Puts what others want to write into the copied rest; nothing more is merged after.
    func takeMerged(head: IOVector, tail: IOVector) {
        state = .writing
        for (offset, vector) in merged {
            if offset < data.lowerBound {
                head.slice(offset - written.lowerBound, vector.count).copy(from: vector)
            } else {
                tail.slice(offset - data.upperBound, vector.count).copy(from: vector)
            }
        }
        merged = []
    }
}

extension QCOW2Driver {
    /// The request that is about to change the entry of a guest cluster.
    func conflict(_ cluster: Int) -> QCOW2Allocation? {
        if allocations.isEmpty { return nil }
        return allocations.first { $0.clusters.contains(cluster) }
    }

    /// Begins to write the start of `vector` to clusters that `other` is allocating.
    ///
    /// - Returns: the bytes that are on their way; 0 when it had to wait instead.
    func startBeside(
        _ other: QCOW2Allocation, _ offset: Int, _ vector: IOVector, _ lanes: RequestLanes
    ) async throws(BlockError) -> Int {
        let count = min(vector.count, other.clusters.upperBound << geometry.clusterBits - offset)
        let way = other.way(for: offset..<(offset + count))
        guard way != .wait else {
            await other.queue.wait()
            return 0
        }
        let part = vector.slice(0, count)
        await lanes.start(isLast: count == vector.count) { () throws(BlockError) in
            try await self.write(beside: other, way, offset, part)
        }
        return count
    }

    private func write(
        beside other: QCOW2Allocation, _ way: QCOW2Allocation.Way, _ offset: Int,
        _ part: IOVector
    ) async throws(BlockError) {
        if way == .merge {
            other.merge(offset, part)
        } else {
            let epoch = epochs.enter()
            defer { epochs.leave(epoch) }
            await file.reached(.writeAIO)
            try await writeData(offset + other.hostDifference, offset, from: part)
        }
        while other.state != .ended { await other.queue.wait() }
        // Not linked: nothing of it is there. The other request tells its own failure.
        if !other.isLinked { try await writeRuns(offset, part) }
    }
}
