import BlockCore
import BlockGraph
import BlockIO

/// `qcow2`: copy-on-write images, versions 2 and 3.
///
/// ```
/// read       L2 slice in memory → one child read for each run of clusters that follow each other
/// write      cluster in place: one child write
///            no cluster yet:   clusters reserved → data written (with the copied rest of the
///                              clusters) → entries linked in memory
/// commit     (flush, or a full cache)
///            1 changed L2 slices and L1 sectors are copied aside, removals frozen
///            2 refcount blocks written     3 file flushed: counts, data and new tables are durable
///            4 the copies written          5 file flushed: links and removals are durable
///            6 what was removed is discarded below, and its refcounts fall
/// ```
/// Snapshots (`QCOW2Driver+Snapshots.swift`) share clusters and L2 tables with the live disk. What is
/// shared has a count above one and no COPIED flag: a write puts a new cluster, or a copy of the table,
/// in its place.
///
/// Invariants, which make a crash at any point leak clusters at worst:
/// 1. A count is durable before an entry that uses the cluster (2 and 3 before 4).
/// 2. Data, copied data and the content of a new table are durable before the entry that links them:
///    an entry enters a slice only after its data's write has completed, and 3 is before 4.
/// 3. An entry's removal is durable before the count falls (5 before 6), and a cluster is not used
///    again while a request that saw the old entry is in flight (`epochs`).
/// 4. Between a look at an entry and its change there is no `await`.
/// 5. Requests that change the same entry wait for each other in `allocations`.
public final class QCOW2Driver: BlockDriver, @unchecked Sendable {
    let node: BlockNode
    var thread: IOThread { node.thread }
    let file: Edge
    /// Where guest data is: ``file``, or a file of its own. An image that is opened for information alone
    /// has no file of its own open.
    let data: Edge
    let hasDataFile: Bool
    let image: QCOW2Image
    let geometry: QCOW2.Geometry
    let options: QCOW2Options
    /// Version 3. Changed by `amend` alone.
    var hasZeroFlag: Bool
    let hasSubclusters: Bool

    let l2: QCOW2TableCache
    let refcounts: QCOW2Refcounts
    let bitmaps: QCOW2Bitmaps
    /// log2 of the entries in a slice, and of the guest bytes that one maps.
    let sliceEntryBits: Int
    let sliceShift: Int

    /// Allocating requests in flight.
    var allocations: [QCOW2Allocation] = []
    /// L1 indices whose L2 table is being made.
    var tablesInCreation: [Int: WaitQueue] = [:]
    var epochs = QCOW2Epochs()

    // Of commits.
    /// Numbers of sectors of the L1 table, of 64 entries each.
    var dirtyL1Sectors = Set<Int>()
    /// Entries were linked since the last commit.
    var hasNewLinks = false
    var removed: [Removal] = []
    var frozen: [Removal] = []
    /// The removal of all of `frozen` is durable.
    var frozenIsDurable = false
    var removedClusterCount = 0
    var commitStarted = 0
    var commitSucceeded = 0
    var commitRunning: WaitQueue?

    /// The snapshot table.
    var snapshots: [QCOW2.Snapshot] = []
    /// In the file, whole clusters.
    var snapshotTable = ByteRange(0, 0)
    /// Who reads a snapshot, or is about to.
    var snapshotUsers: [(identifier: [UInt8], name: String)] = []
    /// What they read it with.
    var snapshotReaders: [QCOW2SnapshotReader] = []
    /// The dirty bit stands for a change of references that is under way, or was not finished.
    var changesReferences = false

    var decompressed = QCOW2DecompressedClusters()
    /// `nil` for images that are not encrypted.
    var encryption: QCOW2Encryption?
    var cleaner: IOTimer?

    /// Clusters that lost a reference whose removal is not durable yet.
    struct Removal {
        var first: Int
        var count: Int
        var discards: Bool
    }

    init(
        _ node: BlockNode, _ file: Edge, data: Edge?, _ image: QCOW2Image,
        _ options: QCOW2Options, refcountTable: [UInt64]
    ) {
        self.node = node
        self.file = file
        self.data = data ?? file
        hasDataFile = image.header.incompatible.contains(.externalData)
        self.image = image
        self.options = options
        geometry = image.geometry
        hasZeroFlag = image.header.version == 3
        hasSubclusters = image.geometry.hasSubclusters
        let sliceBytes = min(options.l2SliceBytes, geometry.clusterSize)
        l2 = QCOW2TableCache(file: file, sliceBytes: sliceBytes, bytesMax: options.l2CacheBytes)
        sliceEntryBits = sliceBytes.trailingZeroBitCount - image.geometry.l2EntryShift
        sliceShift = sliceEntryBits + geometry.clusterBits
        refcounts = QCOW2Refcounts(
            image, table: refcountTable, cacheBytes: options.refcountCacheBytes)
        bitmaps = QCOW2Bitmaps(image, refcounts)
        node.size = image.header.size
        takeLimits()
    }

    /// Again once it is known whether the image is encrypted.
    func takeLimits() {
        var limits = data.node.limits
        limits.requestAlignment = min(limits.requestAlignment, geometry.clusterSize)
        if isEncrypted {
            limits.requestAlignment = max(limits.requestAlignment, ImageCipher.sectorSize)
        }
        limits.allocationUnit = geometry.clusterSize
        node.limits = limits
    }

    public func childLimitsChanged(_ edge: Edge) {
        if edge === data { takeLimits() }
    }

    public var snapshotStore: (any InternalSnapshotStore)? { self }

    public var filename: String { file.node.driver.filename }

    public func access(to edge: Edge, for users: Access) -> Access {
        var users = users
        if edge.roles.contains(.cow) {
            // A write to a part of a cluster copies the rest from below; so does a new end of the disk.
            if !users.uses.isDisjoint(with: [.write, .writeUnchanged, .resize]) {
                users.uses.insert(.consistentRead)
            }
            // What a snapshot does not have itself is read below, and stays what it was.
            if !snapshotUsers.isEmpty {
                users.uses.insert(.consistentRead)
                users.shares.subtract([.write, .resize])
            }
        } else if !edge.roles.contains(.metadata) {
            // A data file that is shorter than the disk grows with the first write past its end.
            if !users.uses.isDisjoint(with: [.write, .writeUnchanged]), edge.size < node.size {
                users.uses.insert(.resize)
            }
            // Bytes between the old end and the new one are zeroed, or reserved.
            if users.uses.contains(.resize) { users.uses.insert(.write) }
        }
        return DefaultAccess.access(
            roles: edge.roles, isWritable: !node.isReadOnly, for: users)
    }

    public func checkAccess(_ access: Access) throws(BlockError) {
        try checkKey(access)
    }

    /// The external data file belongs to the tables, as they do to the file.
    public func checkReplacement(of edge: Edge, with node: BlockNode) throws(BlockError) {
        if edge === file || edge === data { try edge.requireSameBytes(in: node) }
    }

    /// The metadata stays where it is, and so does what a snapshot that is read has in the backing image.
    public func checkOtherBytes(behind edge: Edge) throws(BlockError) {
        if edge === file || edge === data { try edge.refuseOtherBytes() }
        guard edge === node.backing, let user = snapshotUsers.last else { return }
        throw BlockError(
            .busy,
            "'\(user.name)' reads a snapshot of the image, and what that does not have itself below it: "
                + "that cannot become another image's",
            remedy: "close '\(user.name)' first", node: node.name)
    }

    /// The file below grows when this driver grows it: the node's size does not follow.
    public func childResized(_ edge: Edge) {}

    // MARK: Entries

    /// What an entry says of a guest offset, over as many bytes as it holds for.
    struct Run {
        var kind: QCOW2.L2Entry.Kind
        /// In the file, of the run's first byte; for compressed clusters the raw entry.
        var host: Int
        var count: Int
        /// Nothing else uses the clusters.
        var isCopied: Bool
    }

    /// The run of like entries at `offset`, within `slice` and at most `limit` bytes.
    ///
    /// Entries are alike when their kinds are, and clusters follow each other in the file.
    @inline(__always)
    func run(_ slice: QCOW2TableCache.Slice, _ offset: Int, _ limit: Int) -> Run {
        if hasSubclusters { return subclusterRun(slice, offset, limit) }
        let mask = 1 << sliceEntryBits - 1
        let bits = geometry.clusterBits
        var index = (offset >> bits) & mask
        let inCluster = offset & (1 << bits - 1)
        let first = QCOW2.L2Entry(rawValue: slice[index])
        let kind = first.kind(hasZeroFlag: hasZeroFlag, hasDataFile: hasDataFile)
        if kind == .compressed {
            return Run(
                kind: kind, host: Int(truncatingIfNeeded: first.rawValue),
                count: min(limit, 1 << bits - inCluster), isCopied: false)
        }
        var count = 1 << bits - inCluster
        let hasHost = kind == .normal || kind == .zeroAllocated
        // The next entry of the run, had it one: the same flags, the next cluster.
        var next = first.rawValue
        while count < limit, index < mask {
            index += 1
            if hasHost { next &+= UInt64(1 << bits) }
            if slice[index] != next { break }
            count += 1 << bits
        }
        return Run(
            kind: kind, host: hasHost ? first.offset + inCluster : 0, count: min(count, limit),
            isCopied: first.isCopied)
    }

    /// The slice that maps guest `offset`, to be looked at; `nil` where there is no L2 table.
    @inline(__always)
    func slice(at offset: Int) async throws(BlockError) -> QCOW2TableCache.Slice? {
        if let slice = l2.lookup(offset >> sliceShift) { return slice }
        return try await loadSlice(at: offset)
    }

    private func loadSlice(at offset: Int) async throws(BlockError) -> QCOW2TableCache.Slice? {
        guard let host = try await sliceHost(offset) else { return nil }
        let slice = try await l2.load(offset >> sliceShift, host: host) {
            () async throws(BlockError) in try await self.commit()
        }
        // The table may have been copied meanwhile; its content is the same.
        if let current = try await sliceHost(offset) { slice.host = current }
        return slice
    }

    private func sliceHost(_ offset: Int) async throws(BlockError) -> Int? {
        try await sliceHost(offset, in: image.l1)
    }

    /// Where the slice that maps guest `offset` is in the file, by this L1 table.
    func sliceHost(_ offset: Int, in l1: [UInt64]) async throws(BlockError) -> Int? {
        let index = offset >> geometry.l2CoverageBits
        guard index < l1.count else { return nil }
        let table = QCOW2.L1Entry(rawValue: l1[index]).offset
        if table == 0 { return nil }
        guard table.isAligned(to: geometry.clusterSize) else {
            throw await image.corruption("L2 table \(index) is at \(table), which is no cluster")
        }
        let within = (offset >> geometry.clusterBits) & (geometry.l2EntryCount - 1)
        return table + (within >> sliceEntryBits) << (sliceEntryBits + geometry.l2EntryShift)
    }

    /// Refuses data clusters at offsets that no image has.
    @inline(__always)
    func checkHost(_ run: Run, _ offset: Int) async throws(BlockError) {
        let misplaced =
            hasDataFile
            ? run.host != offset : (run.host - offset) & (geometry.clusterSize - 1) != 0
        if misplaced {
            throw await image.corruption(
                "the data of guest offset \(offset) is at \(run.host), which is no cluster")
        }
    }
}

/// Counts requests by when they began, so that a removed cluster is not reused under one of them.
///
/// There are two epochs at a time. `turn` begins a new one, once the older one is empty.
struct QCOW2Epochs {
    private var counts = (0, 0)
    private var current = 0

    @inline(__always)
    mutating func enter() -> Int {
        if current == 0 { counts.0 += 1 } else { counts.1 += 1 }
        return current
    }

    @inline(__always)
    mutating func leave(_ epoch: Int) {
        if epoch == 0 { counts.0 -= 1 } else { counts.1 -= 1 }
    }

    /// Whether every request that began before the last `turn` has ended.
    var olderIsEmpty: Bool { current == 0 ? counts.1 == 0 : counts.0 == 0 }

    mutating func turn() {
        precondition(olderIsEmpty)
        current = 1 - current
    }
}
