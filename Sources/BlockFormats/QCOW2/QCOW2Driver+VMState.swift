import BlockCore
import BlockGraph

// Saved state of a virtual machine: clusters that the L1 table maps past the disk's end. It begins with what the
// first L1 entry past the disk covers (qcow2 specification, "Snapshots": `vm_state_size`).
//
//     L1      disk ─────────────────┤ state ──────────────▶
//     guest   0 … size … (rounded up to what an entry covers)
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
        try await readRuns(place, into: vector, of: self)
    }

    public func writeMachineState(
        _ offset: Int, from vector: IOVector
    ) async throws(BlockError) {
        let place = try statePlace(offset, vector.count)
        try checkWritable()
        let entries = geometry.l1EntryCount(for: place + vector.count)
        if entries > image.l1.count { try await growL1(to: entries) }
        try await writeRuns(place, vector)
    }
}
