import BlockCore
import BlockGraph
import BlockIO

/// The refcounts of an open image, and the search for free clusters.
///
/// Invariants:
/// 1. A count in memory is never below the number of references on disk: it rises before a
///    reference is made and falls after the reference's removal is durable. Refcount blocks may
///    therefore be written at any time.
/// 2. `cursor` never passes a free cluster, other than those of `freed`.
/// 3. Between a look at counts and their change there is no `await`.
final class QCOW2Refcounts {
    struct Allocation {
        /// In the file.
        let offset: Int
        /// Clusters, at least one.
        let count: Int
        /// Never written since the file grew: reads as zeroes.
        let isFresh: Bool
    }

    private struct Run {
        var first: Int
        var count: Int
        var isFresh = false
    }

    static let freedRunCountMax = 65_536

    private let image: QCOW2Image
    let geometry: QCOW2.Geometry
    private let cache: QCOW2TableCache
    /// Refcounts of a slice: log2.
    private let sliceBits: Int
    /// The refcount table in host order.
    private var table: [UInt64]
    private var dirtyTableEntries = Set<Int>()
    /// No free cluster below it, but for `freed`. A cluster number.
    private var cursor = 0
    private var freed: [Run] = []
    /// One past the highest cluster that was ever handed out.
    private var highest = 0
    private var extending: WaitQueue?
    private var writing: WaitQueue?
    /// Of compressed clusters; see `QCOW2Refcounts+Packing.swift`.
    var open: OpenCluster?
    var packing: WaitQueue?

    init(
        _ image: QCOW2Image, table: [UInt64], cacheBytes: Int
    ) {
        self.image = image
        geometry = image.geometry
        self.table = table
        let sliceBytes = min(geometry.clusterSize, 4096)
        cache = QCOW2TableCache(
            file: image.file, sliceBytes: sliceBytes, bytesMax: cacheBytes, loads: .refblockLoad)
        sliceBits = sliceBytes.trailingZeroBitCount + 3 - geometry.refcountOrder
        for entry in table where entry != 0 { image.addRefcountBlock(at: Int(entry)) }
    }

    var isDirty: Bool { !cache.dirty.isEmpty || !dirtyTableEntries.isEmpty }

    // MARK: Slices

    private func blockOffset(of cluster: Int) -> Int {
        let index = cluster >> geometry.refcountBlockBits
        return index < table.count ? Int(table[index]) : 0
    }

    /// The slice that counts `cluster`; `nil` where there is no block.
    func slice(for cluster: Int) async throws(BlockError) -> QCOW2TableCache.Slice? {
        let key = cluster >> sliceBits
        if let slice = cache.lookup(key) { return slice }
        let block = blockOffset(of: cluster)
        if block == 0 { return nil }
        guard block.isAligned(to: geometry.clusterSize) else {
            throw await image.corruption("a refcount block is at \(block), which is no cluster")
        }
        let within = (cluster & (geometry.clustersPerRefcountBlock - 1)) >> sliceBits
        return try await cache.load(key, host: block + within * cache.sliceBytes) {
            () async throws(BlockError) in try await self.writeBlocks()
        }
    }

    @inline(__always)
    private func index(_ cluster: Int) -> Int { cluster & ((1 << sliceBits) - 1) }

    func get(_ slice: QCOW2TableCache.Slice, _ cluster: Int) -> UInt64 {
        QCOW2.Refcount.get(
            UnsafeRawBufferPointer(slice.bytes), index(cluster), order: geometry.refcountOrder)
    }

    func set(_ slice: QCOW2TableCache.Slice, _ cluster: Int, _ value: UInt64) {
        QCOW2.Refcount.set(
            slice.bytes, index(cluster), to: value, order: geometry.refcountOrder)
        cache.markDirty(slice)
    }

    /// How often cluster `cluster` is used.
    func count(of cluster: Int) async throws(BlockError) -> UInt64 {
        guard let slice = try await slice(for: cluster) else { return 0 }
        return get(slice, cluster)
    }

    // MARK: Allocation

    /// Takes up to `wanted` clusters that follow each other. The file reaches past them on return.
    func allocate(upTo wanted: Int) async throws(BlockError) -> Allocation {
        await image.file.reached(.clusterAlloc)
        let run = try await take(upTo: wanted, exactly: false)
        return try await grown(run)
    }

    /// Takes exactly `wanted` clusters that follow each other: for tables.
    func allocate(exactly wanted: Int) async throws(BlockError) -> Allocation {
        if wanted == 1 { return try await allocate(upTo: 1) }
        await image.file.reached(.clusterAlloc)
        // Runs that are too short go back, once the search is over.
        var short: [Run] = []
        var parts = Run(first: 0, count: 0)
        do throws(BlockError) {
            while parts.count < wanted {
                let run = try await take(upTo: wanted - parts.count, exactly: true)
                if parts.count > 0, run.first == parts.first + parts.count {
                    parts.count += run.count
                    parts.isFresh = parts.isFresh && run.isFresh
                } else {
                    if parts.count > 0 { short.append(parts) }
                    parts = run
                }
                if parts.count < wanted, short.count > 1 << 20 {
                    throw BlockError(.noSpace, "no \(wanted) free clusters in a row")
                }
            }
        } catch {
            for run in short + [parts] { try? await release(run.first, run.count) }
            throw error
        }
        for run in short { try await release(run.first, run.count) }
        return try await grown(parts)
    }

    private func grown(_ run: Run) async throws(BlockError) -> Allocation {
        let end = run.first + run.count
        let offset = run.first << geometry.clusterBits
        TracePoint.qcow2Allocate(
            "node \(image.node.name) offset \(offset) clusters \(run.count)")
        do throws(BlockError) {
            if end << geometry.clusterBits > image.file.size {
                try await image.ensureSize(end << geometry.clusterBits)
            }
        } catch {
            try? await release(run.first, run.count)
            throw error
        }
        if let name = image.overlap(offset, run.count << geometry.clusterBits) {
            throw await image.corruption(
                "the refcounts say that the \(name) at \(offset) in the file is free")
        }
        return Allocation(offset: offset, count: run.count, isFresh: run.isFresh)
    }

    private func take(upTo wanted: Int, exactly: Bool) async throws(BlockError) -> Run {
        // Tables want to stand in a row: they take what is at the end.
        if !exactly {
            while let run = freed.popLast() {
                if let taken = try await takeFreed(run, wanted) { return taken }
            }
        }
        while true {
            let start = cursor
            guard start < QCOW2.Limit.hostOffsetMax >> geometry.clusterBits else {
                throw BlockError(.noSpace, "the image has as many clusters as the format allows")
            }
            guard let slice = try await slice(for: start) else {
                try await extend(to: start)
                continue
            }
            // Another task may have moved on while the slice was loading.
            if cursor != start { continue }
            let end = (start >> sliceBits + 1) << sliceBits
            guard
                let found = QCOW2.Refcount.firstZero(
                    UnsafeRawBufferPointer(slice.bytes), from: index(start),
                    to: 1 << sliceBits, order: geometry.refcountOrder)
            else {
                cursor = end
                continue
            }
            let first = (start >> sliceBits) << sliceBits + found
            return mark(slice, first, min(wanted, end - first), movesCursor: true)
        }
    }

    /// Counts the free clusters from `first` on, at most `limit`, as used.
    private func mark(
        _ slice: QCOW2TableCache.Slice, _ first: Int, _ limit: Int, movesCursor: Bool
    ) -> Run {
        var count = 0
        while count < limit, get(slice, first + count) == 0 {
            set(slice, first + count, 1)
            count += 1
        }
        if movesCursor { cursor = first + count }
        let isFresh = first >= highest && first << geometry.clusterBits >= image.grownFrom
        highest = max(highest, first + count)
        return Run(first: first, count: count, isFresh: isFresh)
    }

    private func takeFreed(_ run: Run, _ wanted: Int) async throws(BlockError) -> Run? {
        guard let slice = try await slice(for: run.first) else { return nil }
        let end = min(run.first + run.count, (run.first >> sliceBits + 1) << sliceBits)
        let taken = mark(slice, run.first, min(wanted, end - run.first), movesCursor: false)
        // A cluster that is in use again was found by the cursor: skip it.
        let used = max(taken.count, 1)
        if used < run.count {
            freed.append(Run(first: run.first + used, count: run.count - used))
        }
        return taken.count > 0 ? taken : nil
    }

    // MARK: Release

    /// Drops one reference to each of `count` clusters. Their removal from tables is durable.
    func release(_ first: Int, _ count: Int) async throws(BlockError) {
        await image.file.reached(.clusterFree)
        var cluster = first
        while cluster < first + count {
            let slice = try await usedSlice(for: cluster)
            let end = min(first + count, (cluster >> sliceBits + 1) << sliceBits)
            while cluster < end {
                let value = get(slice, cluster)
                guard value > 0 else { throw await unused(cluster) }
                set(slice, cluster, value - 1)
                if value == 1 { noteFree(cluster) }
                cluster += 1
            }
        }
    }

    /// Counts one reference more to each of `count` clusters, which are in use; all of them or none.
    ///
    /// - Throws: `exhausted` where the width of the counts does not allow it.
    func retain(_ first: Int, _ count: Int) async throws(BlockError) {
        var cluster = first
        do throws(BlockError) {
            while cluster < first + count {
                let slice = try await usedSlice(for: cluster)
                let end = min(first + count, (cluster >> sliceBits + 1) << sliceBits)
                while cluster < end {
                    let value = get(slice, cluster)
                    guard value > 0 else { throw await unused(cluster) }
                    guard value < geometry.refcountMax else {
                        throw BlockError(
                            .exhausted,
                            "cluster \(cluster) has \(value) references, as many as refcounts of "
                                + "\(1 << geometry.refcountOrder) bits can count",
                            remedy: "delete snapshots, or give the image wider refcounts")
                    }
                    set(slice, cluster, value + 1)
                    cluster += 1
                }
            }
        } catch {
            // What cannot be taken back leaks.
            try? await release(first, cluster - first)
            throw error
        }
    }

    /// Tells how often each of `count` clusters is used.
    func visit(
        _ first: Int, _ count: Int, _ body: (_ cluster: Int, _ value: UInt64) -> Void
    ) async throws(BlockError) {
        var cluster = first
        while cluster < first + count {
            let slice = try await slice(for: cluster)
            let end = min(first + count, (cluster >> sliceBits + 1) << sliceBits)
            while cluster < end {
                body(cluster, slice.map { get($0, cluster) } ?? 0)
                cluster += 1
            }
        }
    }

    /// - Throws: when one of `count` clusters, which are in use, counts as free: the image is marked corrupt.
    func requireUsed(_ first: Int, _ count: Int) async throws(BlockError) {
        var free: Int?
        try await visit(first, count) { cluster, value in
            if value == 0, free == nil { free = cluster }
        }
        if let free { throw await unused(free) }
    }

    private func usedSlice(for cluster: Int) async throws(BlockError) -> QCOW2TableCache.Slice {
        guard let slice = try await slice(for: cluster) else {
            throw await image.corruption("cluster \(cluster) is in use but has no refcount")
        }
        return slice
    }

    private func unused(_ cluster: Int) async -> BlockError {
        await image.corruption("cluster \(cluster) is in use but its refcount is 0")
    }

    private func noteFree(_ cluster: Int) {
        closeOpenCluster(in: cluster, 1)
        if cluster >= cursor { return }
        if let last = freed.last, last.first + last.count == cluster {
            freed[freed.count - 1].count += 1
        } else if freed.count < Self.freedRunCountMax {
            freed.append(Run(first: cluster, count: 1))
        } else {
            cursor = min(cursor, cluster)
        }
    }

    // MARK: New blocks

    /// Makes a refcount block for `cluster`, and a larger table where it has no room for it.
    private func extend(to cluster: Int) async throws(BlockError) {
        if let extending {
            await extending.wait()
            return
        }
        let queue = WaitQueue()
        extending = queue
        defer {
            extending = nil
            queue.wakeAll()
        }
        guard blockOffset(of: cluster) == 0 else { return }
        let index = cluster >> geometry.refcountBlockBits
        // The header is there, whatever is counted.
        guard index > 0 else {
            throw await image.corruption("the first refcount block is missing")
        }
        // Nothing is counted there, so nothing is used: the blocks take its first clusters.
        let area = index << geometry.refcountBlockBits
        if index < table.count {
            try await writeNewBlocks(area, blocks: 1, used: 1)
            table[index] = UInt64(area << geometry.clusterBits)
            dirtyTableEntries.insert(index)
            image.addRefcountBlock(at: area << geometry.clusterBits)
        } else {
            try await growTable(index, area)
        }
    }

    /// Writes `blocks` refcount blocks at cluster `area`, which count its first `used` clusters.
    private func writeNewBlocks(_ area: Int, blocks: Int, used: Int) async throws(BlockError) {
        await image.file.reached(.refblockAlloc)
        try await image.checkOverlap(
            area << geometry.clusterBits, used << geometry.clusterBits, "refcount blocks")
        try await image.ensureSize((area + used) << geometry.clusterBits)
        highest = max(highest, area + used)
        let vector = try IOVector(allocating: blocks << geometry.clusterBits)
        vector.fill(0)
        if let slice = vector.single {
            for cluster in 0..<used {
                QCOW2.Refcount.set(slice.bytes, cluster, to: 1, order: geometry.refcountOrder)
            }
        }
        await image.file.reached(.refblockAllocWrite)
        try await image.file.write(area << geometry.clusterBits, from: vector)
    }

    /// The table moves to the end of the file, half as large again.
    private func growTable(_ index: Int, _ area: Int) async throws(BlockError) {
        let perCluster = geometry.clusterSize / 8
        let wanted = (max(index + 1, table.count + table.count / 2) + 64) / perCluster + 1
        let clusters = min(
            wanted, max(1, QCOW2.Limit.refcountTableBytesMax >> geometry.clusterBits))
        var blocks = 1
        while blocks << geometry.refcountBlockBits < blocks + clusters { blocks += 1 }
        guard index + blocks <= clusters * perCluster else {
            throw BlockError(
                .noSpace,
                "the refcount table would exceed \(QCOW2.Limit.refcountTableBytesMax) "
                    + "bytes", remedy: "use an image with larger clusters")
        }
        // What is pending goes to the old table first: the new one holds only what is on disk.
        try await writeBlocks()
        await image.file.reached(.reftableGrow)
        try await writeNewBlocks(area, blocks: blocks, used: blocks + clusters)
        var larger = table
        larger.append(
            contentsOf: [UInt64](repeating: 0, count: clusters * perCluster - table.count))
        for block in 0..<blocks {
            larger[index + block] = UInt64((area + block) << geometry.clusterBits)
        }
        let offset = (area + blocks) << geometry.clusterBits
        await image.file.reached(.refblockAllocWriteTable)
        try await image.file.write(offset, from: try QCOW2Image.vector(Self.bigEndian(larger[...])))
        try await image.file.flush()

        await image.file.reached(.refblockAllocSwitchTable)
        let old = (image.header.refcountTableOffset, image.header.refcountTableClusters)
        image.header.refcountTableOffset = offset
        image.header.refcountTableClusters = clusters
        do throws(BlockError) {
            try await image.writeHeader()
            try await image.file.flush()
        } catch {
            // Which table the disk names now is not known: neither may change.
            throw await image.corruption("a larger refcount table could not be put in place")
        }
        table = larger
        dirtyTableEntries = []
        for block in 0..<blocks {
            image.addRefcountBlock(at: (area + block) << geometry.clusterBits)
        }
        try await release(old.0 >> geometry.clusterBits, old.1)
    }

    static func bigEndian(_ words: ArraySlice<UInt64>) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: words.count * 8) { buffer, count in
            let bytes = UnsafeMutableRawBufferPointer(buffer)
            for (index, word) in words.enumerated() { bytes.storeBigEndian(word, at: index * 8) }
            count = words.count * 8
        }
    }

    // MARK: Writing out

    /// Writes changed blocks, then the table entries of new ones. Not durable before a flush.
    func writeBlocks() async throws(BlockError) {
        while let writing { await writing.wait() }
        guard isDirty else { return }
        let queue = WaitQueue()
        writing = queue
        defer {
            writing = nil
            queue.wakeAll()
        }
        // As copies: counts go on changing, and what is handed to a disk must not. Some take it in more than once,
        // for a checksum, say.
        let copies = try cache.copyDirty()
        let slices = cache.takeDirty()
        let entries = dirtyTableEntries
        dirtyTableEntries = []
        for slice in slices { slice.isWriting = true }
        defer { for slice in slices { slice.isWriting = false } }
        do throws(BlockError) {
            for slice in slices {
                try await image.checkOverlap(
                    slice.host, cache.sliceBytes, ignoring: .refcountBlock, "refcounts")
            }
            if !slices.isEmpty { await image.file.reached(.refblockUpdatePart) }
            try await QCOW2TableCache.write(copies, to: image.file)
            if !entries.isEmpty { try await writeTable(entries) }
        } catch {
            for slice in slices { cache.markDirty(slice) }
            dirtyTableEntries.formUnion(entries)
            throw error
        }
    }

    private func writeTable(_ entries: Set<Int>) async throws(BlockError) {
        // A block is on disk before the table names it.
        try await image.file.flush()
        await image.file.reached(.reftableUpdate)
        for sector in Set(entries.map { $0 >> 6 }) {
            let range = sector << 6..<min((sector + 1) << 6, table.count)
            let vector = try QCOW2Image.vector(Self.bigEndian(table[range]))
            let host = image.header.refcountTableOffset + sector << 9
            try await image.checkOverlap(
                host, vector.count, ignoring: .refcountTable, "the refcount table")
            try await image.file.write(host, from: vector)
        }
    }

    /// One past the last cluster in use, as far as the counts up to the end of the file tell.
    func lastUsedEnd(fileSize: Int) async throws(BlockError) -> Int {
        var cluster = geometry.clusterCount(for: fileSize) - 1
        while cluster >= 0 {
            if let slice = try await slice(for: cluster) {
                let first = (cluster >> sliceBits) << sliceBits
                while cluster >= first {
                    if get(slice, cluster) != 0 { return cluster + 1 }
                    cluster -= 1
                }
            } else {
                cluster = (cluster >> geometry.refcountBlockBits) << geometry.refcountBlockBits - 1
            }
        }
        return 0
    }

    func dropUnused() { cache.dropUnused() }
}
