import BlockCore
import BlockGraph

// What needs neither a table from the file nor a new cluster. Nothing else runs between the look at
// the entry and the end of the request, so epochs and allocations need not know of it.

extension QCOW2Driver {
    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        readNow(offset, into: vector, of: self)
    }

    /// Reads run by run what all is in memory; where something is not, nothing of `vector` counts.
    func readNow(_ offset: Int, into vector: IOVector, of view: some QCOW2TableView) -> Bool {
        var done = 0
        while done < vector.count {
            let position = offset + done
            guard let slice = view.sliceInMemory(at: position) else { return false }
            let run = run(slice, position, vector.count - done)
            let part = run.count == vector.count ? vector : vector.slice(done, run.count)
            guard readNow(run, position, into: part) else { return false }
            done += run.count
        }
        return true
    }

    private func readNow(_ run: Run, _ offset: Int, into part: IOVector) -> Bool {
        switch run.kind {
        case .normal:
            guard isInPlace(run, offset), run.host &+ run.count <= data.size else { return false }
            return data.readNow(run.host, into: part)
        case .zeroPlain, .zeroAllocated:
            part.fill(0)
            return true
        case .unallocated:
            guard let backing = node.backing, offset < backing.size else {
                part.fill(0)
                return true
            }
            return backing.readNow(offset, into: part)
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
