import BlockCore
import BlockGraph

/// Tables that map a disk: the live one's, or a snapshot's.
protocol QCOW2TableView: AnyObject, Sendable {
    /// The slice that maps guest `offset`, to be looked at; `nil` where there is no L2 table.
    func slice(at offset: Int) async throws(BlockError) -> QCOW2TableCache.Slice?
    /// Whether there is an L1 entry `index`, and it names no L2 table.
    func hasNoTable(_ index: Int) -> Bool
}

extension QCOW2Driver: QCOW2TableView {
    func hasNoTable(_ index: Int) -> Bool {
        index < image.l1.count && QCOW2.L1Entry(rawValue: image.l1[index]).offset == 0
    }

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        let epoch = epochs.enter()
        defer { epochs.leave(epoch) }
        // The common case: the slice is in memory, and one run has it all.
        if let slice = l2.lookup(offset >> sliceShift) {
            let run = run(slice, offset, vector.count)
            if run.kind == .normal, run.count == vector.count, !isEncrypted,
                run.host &+ run.count <= data.size,
                isInPlace(run, offset)
            {
                await file.reached(.readAIO)
                try await data.read(run.host, into: vector, flags)
                return
            }
        }
        try await readRuns(offset, into: vector, of: self)
    }

    /// Reads run by run, several at once where there is more than one.
    func readRuns(
        _ offset: Int, into vector: IOVector, of view: some QCOW2TableView
    ) async throws(BlockError) {
        let first = try await run(at: offset, limit: vector.count, of: view)
        if first.count == vector.count {
            try await read(first, offset, into: vector)
            return
        }
        let lanes = QCOW2Lanes(on: node.seat)
        await lanes.start { () throws(BlockError) in
            try await self.read(first, offset, into: vector.slice(0, first.count))
        }
        do throws(BlockError) {
            var done = first.count
            while done < vector.count, lanes.failure == nil {
                await lanes.waitForRoom()
                let position = offset + done
                let run = try await run(at: position, limit: vector.count - done, of: view)
                let part = vector.slice(done, run.count)
                let isLast = done + run.count == vector.count
                await lanes.start(isLast: isLast) { () throws(BlockError) in
                    try await self.read(run, position, into: part)
                }
                done += run.count
            }
        } catch {
            // The memory is the caller's again once nothing writes to it.
            try? await lanes.finish()
            throw error
        }
        try await lanes.finish()
    }

    /// The run at guest `offset`, of at most `limit` bytes.
    func run(
        at offset: Int, limit: Int, of view: some QCOW2TableView
    ) async throws(BlockError) -> Run {
        if let slice = try await view.slice(at: offset) { return run(slice, offset, limit) }
        let count = unmapped(at: offset, limit: limit, of: view)
        return Run(kind: .unallocated, host: 0, count: count, isCopied: false)
    }

    /// How many bytes from `offset` on, which no table maps, none does: all that the missing table would map
    /// is unallocated, and so on to the next table.
    func unmapped(at offset: Int, limit: Int, of view: some QCOW2TableView) -> Int {
        let coverage = 1 << geometry.l2CoverageBits
        var count = coverage - offset & (coverage - 1)
        var index = offset >> geometry.l2CoverageBits + 1
        while count < limit, view.hasNoTable(index) {
            count += coverage
            index += 1
        }
        return min(limit, count)
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
            if isEncrypted {
                try await readEncrypted(run.host, position, into: part)
            } else {
                try await readStored(run.host, into: part)
            }
        case .compressed:
            try await readCompressed(
                QCOW2.L2Entry(rawValue: UInt64(bitPattern: Int64(run.host))), position, into: part)
        }
    }

    /// Guest data, where it is stored; zeroes past the end of that file.
    func readStored(_ host: Int, into vector: IOVector) async throws(BlockError) {
        let there = max(0, min(vector.count, data.size - host))
        if there < vector.count { vector.zero(there, vector.count - there) }
        await file.reached(.readAIO)
        if there > 0 { try await data.read(host, into: vector.slice(0, there)) }
    }

    /// Tables of the file; zeroes past its end.
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
        await file.reached(.readBackingAIO)
        if there > 0 { try await backing.read(offset, into: vector.slice(0, there)) }
    }

    /// Bytes as a guest reads them, for copying the rest of a cluster; zeroes past the disk's end.
    func readGuest(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        let there = max(0, min(vector.count, node.size - offset))
        if there < vector.count { vector.zero(there, vector.count - there) }
        if there > 0 { try await readRuns(offset, into: vector.slice(0, there), of: self) }
    }
}
