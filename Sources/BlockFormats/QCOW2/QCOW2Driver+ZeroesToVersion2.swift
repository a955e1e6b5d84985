import BlockCore
import BlockGraph

// Version 2 has no clusters of zeroes. Those of the disk and of all snapshots become unallocated, or data
// where there is a backing image to be seen. Nothing is in flight on the node, and no L2 slice in memory.
//
//     for each L2 table: clusters taken, counted, zeroed │ table written in place │ what it kept is given back
//
// Each `│` is a flush: a crash leaks clusters at worst, and leaves an image of version 3. A table that
// snapshots share stays shared: what it refers to has as many references as itself.

extension QCOW2Driver {
    private static let zeroBytesMax = 1 << 20

    /// Durable but for counts in memory.
    func writeOutZeroes() async throws(BlockError) {
        try await prepareChange()
        let maps = QCOW2Maps(of: self)
        for window in maps.windows {
            let entries = try await maps.entries(window, in: file)
            for step in 0..<window.count {
                var hosts: Set<Int> = []
                for map in entries where step < map.count { hosts.insert(try tableHost(map[step])) }
                hosts.remove(0)
                let guest = (window.lowerBound + step) << geometry.l2CoverageBits
                for host in hosts.sorted() { try await writeOutZeroes(ofTable: host, guest) }
            }
        }
        // Readers of snapshots may have seen what is no more.
        for reader in snapshotReaders { reader.follow(self) }
    }

    /// - Parameter guest: where the part of a disk that the table maps begins.
    private func writeOutZeroes(ofTable host: Int, _ guest: Int) async throws(BlockError) {
        var table = try await Self.readTable(file, host, geometry.l2EntryCount)
        let zeroes = table.indices.filter { Self.isZero(table[$0]) }
        if zeroes.isEmpty { return }
        let references = try await refcounts.count(of: host >> geometry.clusterBits)
        let kept = zeroes.map { QCOW2.L2Entry(rawValue: table[$0]).offset }.filter { $0 != 0 }
        // One that was left out shows again when the image is opened with it: how long it is is not known.
        let absent = image.header.backingName.isEmpty ? 0 : Int.max
        let backingEnd = node.backing?.size ?? absent
        let shown = zeroes.filter { guest + $0 << geometry.clusterBits < backingEnd }
        for index in zeroes { table[index] = 0 }
        var done = 0
        while done < shown.count {
            let most = min(shown.count - done, max(1, Self.zeroBytesMax >> geometry.clusterBits))
            let found = try await takeZeroes(shown[done..<(done + most)], guest, references)
            let flag = references == 1 ? QCOW2.L2Entry.copiedFlag : 0
            for step in 0..<found.count {
                let place = found.offset + step << geometry.clusterBits
                table[shown[done + step]] = UInt64(place) | flag
            }
            done += found.count
        }
        try await refcounts.writeBlocks()
        try await file.flush()
        try await writeTable(table, at: host)
        try await file.flush()
        for cluster in kept {
            let first = cluster >> geometry.clusterBits
            for _ in 0..<references { try await refcounts.release(first, 1) }
        }
    }

    private static func isZero(_ raw: UInt64) -> Bool {
        switch QCOW2.L2Entry(rawValue: raw).kind(hasZeroFlag: true) {
        case .zeroPlain, .zeroAllocated: true
        default: false
        }
    }

    /// Takes clusters for the first of `entries`, as many as there are together, and fills them with
    /// zeroes.
    private func takeZeroes(
        _ entries: ArraySlice<Int>, _ guest: Int, _ references: UInt64
    ) async throws(BlockError) -> QCOW2Refcounts.Allocation {
        let found = try await refcounts.allocate(upTo: entries.count)
        let first = found.offset >> geometry.clusterBits
        for _ in 1..<max(1, references) { try await refcounts.retain(first, found.count) }
        let zeroes = try IOVector(allocating: geometry.clusterSize)
        zeroes.fill(0)
        for (step, entry) in entries.prefix(found.count).enumerated() {
            try await writeData(
                found.offset + step << geometry.clusterBits,
                guest + entry << geometry.clusterBits, from: zeroes)
        }
        return found
    }

    private func writeTable(_ table: [UInt64], at host: Int) async throws(BlockError) {
        if let name = image.fixedOverlap(host, geometry.clusterSize) {
            throw await image.corruption("an L2 table at \(host) lies over the \(name)")
        }
        try await file.write(
            host, from: try QCOW2Image.vector(QCOW2Refcounts.bigEndian(table[...])))
    }
}
