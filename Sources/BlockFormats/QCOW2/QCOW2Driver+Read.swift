import BlockCore
import BlockGraph

extension QCOW2Driver {
    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        let epoch = epochs.enter()
        defer { epochs.leave(epoch) }
        // The common case: the slice is in memory, and one run has it all.
        if let slice = l2.lookup(offset >> sliceShift) {
            let run = run(slice, offset, vector.count)
            if run.kind == .normal, run.count == vector.count,
                run.host &+ run.count <= file.size,
                (run.host ^ offset) & (geometry.clusterSize - 1) == 0
            {
                try await file.read(run.host, into: vector, flags)
                return
            }
        }
        try await readRuns(offset, into: vector)
    }

    private func readRuns(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        var done = 0
        while done < vector.count {
            let position = offset + done
            let left = vector.count - done
            guard let slice = try await slice(at: position) else {
                // No table: all that it would map is unallocated.
                let coverage = 1 << geometry.l2CoverageBits
                let count = min(left, coverage - position & (coverage - 1))
                try await readBacking(position, into: vector.slice(done, count))
                done += count
                continue
            }
            let run = run(slice, position, left)
            try await read(run, position, into: vector.slice(done, run.count))
            done += run.count
        }
    }

    private func read(
        _ run: Run, _ position: Int, into part: IOVector
    ) async throws(BlockError) {
        switch run.kind {
        case .unallocated:
            try await readBacking(position, into: part)
        case .zeroPlain, .zeroAllocated:
            part.fill(0)
        case .normal:
            try await checkHost(run, position)
            try await readFile(run.host, into: part)
        case .compressed:
            try await readCompressed(
                QCOW2.L2Entry(rawValue: UInt64(bitPattern: Int64(run.host))), position, into: part)
        }
    }

    /// Data of the file; zeroes past its end.
    func readFile(_ host: Int, into vector: IOVector) async throws(BlockError) {
        let there = max(0, min(vector.count, file.size - host))
        if there < vector.count { vector.zero(there, vector.count - there) }
        if there > 0 { try await file.read(host, into: vector.slice(0, there)) }
    }

    /// What is below this image at a guest offset: the backing image's bytes, zeroes past its end.
    func readBacking(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        guard let backing = node.backing else {
            vector.fill(0)
            return
        }
        let there = max(0, min(vector.count, backing.size - offset))
        if there < vector.count { vector.zero(there, vector.count - there) }
        if there > 0 { try await backing.read(offset, into: vector.slice(0, there)) }
    }

    /// Bytes as a guest reads them, for copying the rest of a cluster; zeroes past the disk's end.
    func readGuest(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        let there = max(0, min(vector.count, node.size - offset))
        if there < vector.count { vector.zero(there, vector.count - there) }
        if there > 0 { try await readRuns(offset, into: vector.slice(0, there)) }
    }
}
