import BlockCore
import BlockGraph

// What needs neither a table from the file nor a new cluster. Nothing else runs between the look at
// the entry and the end of the request, so epochs and allocations need not know of it.

extension QCOW2Driver {
    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        guard let slice = l2.lookup(offset >> sliceShift) else { return false }
        let run = run(slice, offset, vector.count)
        guard run.count == vector.count else { return false }
        switch run.kind {
        case .normal:
            guard isInPlace(run, offset), run.host &+ run.count <= data.size else { return false }
            return data.readNow(run.host, into: vector)
        case .zeroPlain, .zeroAllocated:
            vector.fill(0)
            return true
        case .unallocated:
            guard let backing = node.backing, offset < backing.size else {
                vector.fill(0)
                return true
            }
            return backing.readNow(offset, into: vector)
        case .compressed:
            return false
        }
    }

    public func writeNow(_ offset: Int, from vector: IOVector) -> Bool {
        guard let slice = l2.lookup(offset >> sliceShift) else { return false }
        let run = run(slice, offset, vector.count)
        guard run.kind == .normal, run.isCopied, run.count == vector.count,
            isInPlace(run, offset), run.host &+ run.count <= data.size,
            image.writeFailure == nil, hasDataFile || image.overlap(run.host, run.count) == nil
        else { return false }
        return data.writeNow(run.host, from: vector)
    }

    /// Whether the clusters are where clusters can be, and hold what a guest reads.
    @inline(__always)
    func isInPlace(_ run: Run, _ offset: Int) -> Bool {
        if isEncrypted { return false }
        return hasDataFile
            ? run.host == offset : (run.host ^ offset) & (geometry.clusterSize - 1) == 0
    }
}
