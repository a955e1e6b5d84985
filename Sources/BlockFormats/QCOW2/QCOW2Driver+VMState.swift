import BlockCore
import BlockGraph

// Saved state of a virtual machine: clusters that the L1 table maps past the disk's end. It begins with what the
// first L1 entry past the disk covers (qcow2 specification, "Snapshots": `vm_state_size`).
//
//     L1      disk ─────────────────┤ state ──────────────▶
//     guest   0 … size … (rounded up to what an entry covers)
//
// A backing image has none of it: what it has at the same offset, where it is long enough, is a disk's.
extension QCOW2Driver {
    /// Where `count` bytes of state at `offset` are, as an offset of the guest's.
    private func statePlace(_ offset: Int, _ count: Int) throws(BlockError) -> Int {
        guard !hasDataFile else {
            throw BlockError(
                .unsupported, "images with an external data file keep no saved state of a machine")
        }
        let entries = node.size == 0 ? 0 : geometry.l1EntryCount(for: node.size)
        let start = entries << geometry.l2CoverageBits
        guard let place = start.adding(offset), let end = place.adding(count),
            end <= geometry.sizeMax
        else {
            throw BlockError(
                .outOfRange, "\(count) bytes of state at \(offset) are more than the image can map")
        }
        return place
    }

    public func readMachineState(
        _ offset: Int, into vector: IOVector
    ) async throws(BlockError) {
        let place = try statePlace(offset, vector.count)
        let epoch = epochs.enter()
        defer { epochs.leave(epoch) }
        try await readState(place, into: vector)
    }

    /// What was never written is zeroes, whatever the backing image has there.
    private func readState(_ place: Int, into vector: IOVector) async throws(BlockError) {
        var done = 0
        while done < vector.count {
            let next = try await run(at: place + done, limit: vector.count - done, of: self)
            let part = vector.slice(done, next.count)
            if next.kind == .unallocated {
                part.fill(0)
            } else {
                try await readRuns(place + done, into: part, of: self)
            }
            done += next.count
        }
    }

    public func writeMachineState(
        _ offset: Int, from vector: IOVector
    ) async throws(BlockError) {
        let place = try statePlace(offset, vector.count)
        try checkWritable()
        let entries = geometry.l1EntryCount(for: place + vector.count)
        if entries > image.l1.count { try await growL1(to: entries) }
        try await forEachPiece(place, vector) { place, piece throws(BlockError) in
            let whole = ByteRange(place, piece.count).aligned(to: geometry.clusterSize)
            guard let whole, whole.count != piece.count else {
                return try await writeRuns(place, piece)
            }
            // The rest of a cluster that is copied is filled up as the disk's are, with zeroes past its end:
            // here it is state.
            let cluster = try IOVector(allocating: whole.count)
            try await readState(whole.offset, into: cluster)
            cluster.slice(place - whole.offset, piece.count).copy(from: piece)
            try await writeRuns(whole.offset, cluster)
        }
    }

    /// In order: what lies in a part of the first cluster, whole clusters, and what lies in a part of the last.
    private func forEachPiece(
        _ place: Int, _ vector: IOVector,
        _ body: (Int, IOVector) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        let mask = geometry.clusterSize - 1
        var done = 0
        while done < vector.count {
            let rest = vector.count - done
            let inside = (place + done) & mask
            let count =
                inside == 0 && rest > mask ? rest & ~mask : min(rest, mask + 1 - inside)
            try await body(place + done, vector.slice(done, count))
            done += count
        }
    }
}
