import BlockCore
import BlockGraph

// Block status: what the tables say, and for precise answers what the file says of the data's clusters.
//
// A slice is walked from entry to entry without suspending. Where the file has to be asked, the answer
// is kept: clusters that lie next to each other in the file, in whatever order the guest has them, are
// asked about once.

extension QCOW2Driver {
    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        try await blockStatus(range, of: self, precise: precise, into: answer)
    }

    /// What the tables of `view` say.
    func blockStatus(
        _ range: ByteRange, of view: some QCOW2TableView, precise: Bool,
        into answer: BlockStatusList
    ) async throws(BlockError) {
        var stored: StoredExtent?
        var offset = range.offset
        var looksLeft = Self.statusLookCountMax
        while offset < range.end, looksLeft > 0 {
            looksLeft -= 1
            guard let slice = try await view.slice(at: offset) else {
                let count = unmapped(at: offset, limit: range.end - offset, of: view)
                guard answer.append(BlockStatus([], count: count)) else { return }
                offset += count
                continue
            }
            let end = min(range.end, offset | (1 << sliceShift - 1) + 1)
            while offset < end {
                let run = run(slice, offset, end - offset)
                var status = status(of: run)
                var isSliceKnown = true
                if precise, run.kind == .normal, !isEncrypted {
                    if stored?.range.contains(run.host) != true {
                        stored = try await storedExtent(at: run, aside: answer.aside)
                        // It may have another part of the tables by now.
                        isSliceKnown = false
                    }
                    if let stored {
                        status.count = min(run.count, stored.range.upperBound - run.host)
                        if stored.isZero { status.flags.insert(.zero) }
                    }
                }
                guard answer.append(status) else { return }
                offset += status.count
                if !isSliceKnown { break }
            }
        }
    }

    /// Slices and extents of the file that one question about status looks at.
    static let statusLookCountMax = 256

    /// What the file says of a part of itself.
    private struct StoredExtent {
        var range: Range<Int>
        var isZero: Bool
    }

    /// How far ahead the file is asked, in bytes.
    private static let storedBytesMax = 1 << 30

    /// What is known of the file where `run` begins. Past its end there are only zeroes.
    private func storedExtent(
        at run: Run, aside: BlockStatusList
    ) async throws(BlockError) -> StoredExtent {
        guard run.host < data.size else {
            return StoredExtent(range: run.host..<run.host + run.count, isZero: true)
        }
        // Storage has an extent at hand as a whole; other nodes would have to look for its end.
        let isStorage = data.node.description.kind == .storage
        let count = isStorage ? max(run.count, Self.storedBytesMax) : run.count
        try await data.blockStatus(
            ByteRange(run.host, min(count, data.size - run.host)), into: aside)
        guard let found = aside.runs.first else {
            return StoredExtent(range: run.host..<run.host + run.count, isZero: false)
        }
        return StoredExtent(
            range: run.host..<run.host + found.count, isZero: found.flags.contains(.zero))
    }

    private func status(of run: Run) -> BlockStatus {
        switch run.kind {
        case .unallocated:
            return BlockStatus([], count: run.count)
        case .normal where isEncrypted:
            // What the file holds is not what is read.
            return BlockStatus([.data, .allocated], count: run.count)
        case .normal:
            return BlockStatus(
                [.data, .allocated], count: run.count,
                mapping: .init(node: data.node, offset: run.host))
        case .compressed:
            return BlockStatus([.data, .allocated, .compressed], count: run.count)
        case .zeroPlain:
            return BlockStatus([.zero, .allocated], count: run.count)
        case .zeroAllocated:
            return BlockStatus(
                [.zero, .allocated], count: run.count,
                mapping: isEncrypted ? nil : .init(node: data.node, offset: run.host))
        }
    }

    /// Whether the image looks as if clusters were reserved before they were written: far more of them
    /// are in use than the file has storage for. Where data lies in such an image its file knows better.
    ///
    /// - Parameter storedBytes: what the file takes on its file system.
    public func isPreallocated(storedBytes: Int) async throws(BlockError) -> Bool {
        let stored = storedBytes >> geometry.clusterBits
        // A tenth more, or two clusters, are the file system's way of counting.
        let threshold = max(stored + stored / 9, stored + 2)
        let count = geometry.clusterCount(for: file.size)
        // Images that are only read do not have their refcounts in memory.
        let entries = min(
            image.header.refcountTableClusters << (geometry.clusterBits - 3),
            QCOW2.Limit.refcountTableBytesMax / 8,
            count >> geometry.refcountBlockBits + 1)
        let table = try await Self.readTable(file, image.header.refcountTableOffset, entries)
        var used = 0
        for (index, entry) in table.enumerated() where entry != 0 && used < threshold {
            let left = count - index << geometry.refcountBlockBits
            used += try await clustersInUse(block: entry, of: left)
        }
        return used >= threshold
    }

    /// How many of the first `count` clusters that a refcount block counts are in use.
    private func clustersInUse(block: UInt64, of count: Int) async throws(BlockError) -> Int {
        guard block < UInt64(file.size), Int(block).isAligned(to: geometry.clusterSize) else {
            return 0
        }
        let vector = try IOVector(allocating: geometry.clusterSize)
        let there = min(vector.count, file.size - Int(block))
        vector.zero(there, vector.count - there)
        try await file.read(Int(block), into: vector.slice(0, there))
        guard let bytes = vector.single?.bytes else { return 0 }
        let counts = UnsafeRawBufferPointer(bytes)
        var used = 0
        for cluster in 0..<max(0, min(count, geometry.clustersPerRefcountBlock)) {
            if QCOW2.Refcount.get(counts, cluster, order: geometry.refcountOrder) != 0 { used += 1 }
        }
        return used
    }
}
