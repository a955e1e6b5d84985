import BlockCore
import BlockGraph
import BlockIO

// Writing compressed clusters (§Compressed clusters).
//
// ```
// compressed, on all processors → room taken, byte by byte → data written → entries linked in memory
// ```
// The driver's invariants hold as for plain clusters: room is counted before data goes there, and
// data is written before its entry is linked. Clusters that do not shrink are written plainly.

extension QCOW2Driver {
    /// Compressed clusters are not encrypted: an encrypted image takes none. A data file holds none.
    public var supportsCompressedWrites: Bool { !isEncrypted && !hasDataFile }

    /// What is compressed before any of it is written.
    static let compressedBatchBytesMax = 4 << 20
    static let compressedBatchClusterCountMax = 256

    /// - Throws: `invalidArgument` unless the data is whole clusters; the disk's last may be short.
    func writeCompressed(_ offset: Int, _ vector: IOVector) async throws(BlockError) {
        try checkWritable()
        let size = geometry.clusterSize
        let end = offset + vector.count
        guard offset.isAligned(to: size), end.isAligned(to: size) || end == node.size else {
            throw BlockError(
                .invalidArgument,
                "\(vector.count) bytes at \(offset) are not whole clusters of \(size) bytes, as "
                    + "compressed data must be")
        }
        let batch = max(
            size, min(Self.compressedBatchBytesMax, size * Self.compressedBatchClusterCountMax))
        var done = 0
        while done < vector.count {
            let count = min(batch, vector.count - done)
            try await writeBatch(offset + done, vector.slice(done, count))
            done += count
        }
    }

    private func writeBatch(_ offset: Int, _ data: IOVector) async throws(BlockError) {
        let batch = try QCOW2CompressionBatch(data, clusterSize: geometry.clusterSize)
        let type = image.header.compression
        await thread.offload(sharing: batch.count) { next in
            // Without memory for it, clusters stay as they are.
            guard let compressor = QCOW2Compressor(type) else { return }
            while let index = next() { batch.compress(index, with: compressor) }
        }
        let bits = geometry.clusterBits
        var index = 0
        while index < batch.count {
            var pieces: [IOSlice] = []
            while index + pieces.count < batch.count, let piece = batch[index + pieces.count] {
                pieces.append(piece)
            }
            if pieces.isEmpty {
                let start = index << bits
                while index < batch.count, batch[index] == nil { index += 1 }
                let count = min(index << bits, data.count) - start
                try await write(offset + start, from: data.slice(start, count), [])
                continue
            }
            let end = index + pieces.count
            while index < end {
                let left = pieces.suffix(end - index)
                index += try await writePieces(offset >> bits + index, left)
            }
        }
    }

    /// Writes compressed clusters from guest cluster `first` on, as many as one slice maps and
    /// nobody else changes.
    ///
    /// - Returns: how many; 0 when another request changed the entries meanwhile.
    private func writePieces(
        _ first: Int, _ pieces: ArraySlice<IOSlice>
    ) async throws(BlockError) -> Int {
        let slice = try await writableSlice(at: first << geometry.clusterBits)
        if let other = conflict(first) {
            await other.queue.wait()
            return 0
        }
        let mask = 1 << sliceEntryBits - 1
        let limit = min(first + pieces.count, (first | mask) + 1)
        var end = first + 1
        while end < limit, conflict(end) == nil { end += 1 }
        let allocation = QCOW2Allocation(first..<end, in: slice)
        allocations.append(allocation)
        defer { self.end(allocation) }
        let written = Array(pieces.prefix(end - first))
        let places = try await refcounts.pack(written.map(\.count))
        do throws(BlockError) {
            try await write(written, at: places)
        } catch {
            for place in places {
                removeClusters(place.firstCluster, place.clusterCount, discards: false)
            }
            throw error
        }
        for (step, place) in places.enumerated() {
            let index = (first + step) & mask
            let new = QCOW2.L2Entry(compressed: place, clusterBits: geometry.clusterBits)
            replaced(entry(slice, index), by: new, discards: options.passDiscardOther)
            // The same place may have held something else before.
            decompressed.remove(new.rawValue)
            setEntry(slice, index, new)
        }
        l2.markDirty(slice)
        hasNewLinks = true
        return written.count
    }

    /// Pieces that follow each other in the file go in one request.
    private func write(
        _ pieces: [IOSlice], at places: [QCOW2Refcounts.Place]
    ) async throws(BlockError) {
        var index = 0
        while index < pieces.count {
            let start = places[index].offset
            var whole = IOVector(pieces[index])
            index += 1
            while index < pieces.count, places[index].offset == start + whole.count {
                whole.append(pieces[index])
                index += 1
            }
            try await file.write(start, from: whole)
        }
    }
}

extension QCOW2.L2Entry {
    /// Of a compressed cluster. Never has the copied flag.
    init(compressed place: QCOW2Refcounts.Place, clusterBits: Int) {
        let bits = UInt64(62 - (clusterBits - 8))
        let sectors = (place.offset + place.count - 1) >> 9 - place.offset >> 9
        rawValue = Self.compressedFlag | UInt64(sectors) << bits | UInt64(place.offset)
    }
}
