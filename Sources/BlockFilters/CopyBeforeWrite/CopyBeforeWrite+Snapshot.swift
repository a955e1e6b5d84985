import BlockCore
import BlockGraph
import BlockIO

/// The frozen state, for those who read it.
///
/// A read takes what is copied from the target, and the rest from `file` while it holds the clusters
/// (invariant 2).
extension CopyBeforeWrite {
    public var snapshotSource: (any SnapshotSource)? { self }

    public func readSnapshot(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        let first = try snapshotRun(ByteRange(offset, vector.count))
        if first.range.count == vector.count {
            try await readRun(first, into: vector)
        } else {
            try await readRuns(offset, into: vector)
        }
        // It may have broken while the data was read: then a guest write may have got in between.
        if let breakage { throw breakage }
    }

    /// Reads what is partly copied and partly not, several runs at once.
    private func readRuns(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        let lanes = RequestLanes(on: node.seat)
        do throws(BlockError) {
            var done = 0
            while done < vector.count, lanes.failure == nil {
                await lanes.waitForRoom()
                // What is copied by now: nothing else runs before the read of the run has begun.
                let run = try snapshotRun(ByteRange(offset + done, vector.count - done))
                let part = vector.slice(done, run.range.count)
                done += run.range.count
                await lanes.start(isLast: done == vector.count) { () throws(BlockError) in
                    try await self.readRun(run, into: part)
                }
            }
        } catch {
            // The memory is the caller's again once nothing writes to it.
            try? await lanes.finish()
            throw error
        }
        try await lanes.finish()
    }

    private func readRun(
        _ run: (range: ByteRange, isCopied: Bool), into part: IOVector
    ) async throws(BlockError) {
        if run.isCopied {
            try await target.read(run.range.offset, into: part)
            // A discard of the snapshot may have emptied the target under the read.
            try requirePresent(run.range)
        } else {
            // Beside a copy, if there is one: the guest's write waits for both.
            let clusters = clusters(touching: run.range)
            locks.take(clusters, exclusively: false)
            defer { locks.unlock(clusters, exclusively: false) }
            try await child.read(run.range.offset, into: part)
        }
    }

    /// Nobody's write comes between the look at the clusters and the read: no lock is needed.
    public func readSnapshotNow(_ offset: Int, into vector: IOVector) -> Bool {
        let range = ByteRange(offset, vector.count)
        let clusters = clusters(touching: range)
        guard breakage == nil, present.firstClear(in: clusters) == nil else { return false }
        var done = 0
        while done < range.count {
            let rest = ByteRange(offset + done, range.count - done)
            let run = run(rest, self.clusters(touching: rest))
            let source = run.isCopied ? target : child
            guard source.readNow(rest.offset, into: vector.slice(done, run.range.count)) else {
                return false
            }
            done += run.range.count
        }
        return true
    }

    public func snapshotStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        let run = try snapshotRun(range)
        let found = answer.below
        // Of the whole chain: what the disk's top layer does not have, its backing image may.
        if run.isCopied {
            try await target.chainStatus(run.range, precise: precise, into: found)
            try requirePresent(run.range)
        } else {
            // As for a read: no guest changes these clusters meanwhile.
            let clusters = clusters(touching: run.range)
            locks.take(clusters, exclusively: false)
            defer { locks.unlock(clusters, exclusively: false) }
            try await child.chainStatus(run.range, precise: precise, into: found)
        }
        if let breakage { throw breakage }
        for status in found.runs {
            // Unallocated in the target, after a copy, are the zeroes that were found.
            let isZero = run.isCopied && status.flags.isDisjoint(with: [.data, .zero])
            let flags = isZero ? status.flags.union(.zero) : status.flags
            answer.append(
                BlockStatus(flags.subtracting(.endOfNode), count: status.count))
        }
    }

    public func discardSnapshot(_ range: ByteRange) async throws(BlockError) {
        if let breakage { throw breakage }
        // Whole clusters only; the end of the disk ends one.
        let first = range.offset / clusterSize + (range.offset % clusterSize == 0 ? 0 : 1)
        let end = range.end == snapshotSize ? present.count : range.end / clusterSize
        guard first < end else { return }
        let clusters = first..<end
        // Not needed any more: neither to be read nor to be copied.
        present.clear(clusters)
        waiting.clear(clusters)
        // A copy under way may still write into the target what is about to be dropped there.
        while locks.conflicts(clusters, exclusively: true) {
            await locks.untilChange()
            if let breakage { throw breakage }
        }
        try await target.discard(bytes(of: clusters))
    }

    /// The longest start of `range` that is all copied, or all still in `file`.
    ///
    /// - Throws: when the snapshot is broken, or does not have the first byte.
    private func snapshotRun(
        _ range: ByteRange
    ) throws(BlockError) -> (range: ByteRange, isCopied: Bool) {
        if let breakage { throw breakage }
        let clusters = clusters(touching: range)
        if let missing = present.firstClear(in: clusters) {
            guard missing > clusters.lowerBound else { throw notPresent(at: range.offset) }
            let cut = ByteRange(from: range.offset, to: missing * clusterSize)
            return run(cut, self.clusters(touching: cut))
        }
        return run(range, clusters)
    }

    private func notPresent(at offset: Int) -> BlockError {
        BlockError(
            .permissionDenied, "offset \(offset) does not belong to the snapshot (any more)",
            node: node.name)
    }

    /// - Throws: when the snapshot does not have all of `range`.
    private func requirePresent(_ range: ByteRange) throws(BlockError) {
        if let missing = present.firstClear(in: clusters(touching: range)) {
            throw notPresent(at: max(missing * clusterSize, range.offset))
        }
    }

    private func run(
        _ range: ByteRange, _ clusters: Range<Int>
    ) -> (range: ByteRange, isCopied: Bool) {
        let isCopied = !waiting[clusters.lowerBound]
        let change =
            isCopied ? waiting.firstSet(in: clusters) : waiting.firstClear(in: clusters)
        let end = change.map { min($0 * clusterSize, range.end) } ?? range.end
        return (ByteRange(from: range.offset, to: end), isCopied)
    }

    /// What is left to copy and to read, for progress and queries.
    public var presentBytes: Int {
        min(present.setCount.multiplied(by: clusterSize) ?? snapshotSize, snapshotSize)
    }
}
