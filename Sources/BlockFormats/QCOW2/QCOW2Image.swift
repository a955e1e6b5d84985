import BlockCore
import BlockGraph
import BlockIO

/// What all parts of an open image share: its file, header and L1 table, and whether it may be
/// written. Confined to the graph's thread.
final class QCOW2Image {
    let node: BlockNode
    let file: Edge
    var header: QCOW2.Header
    let geometry: QCOW2.Geometry
    /// In host order.
    var l1: [UInt64] = []
    var overlapCheck = QCOW2OverlapCheck.cached
    /// Clusters of active L2 tables, by cluster number.
    private(set) var tableClusters = Set<Int>()
    /// Those of refcount blocks.
    private(set) var refcountClusters = Set<Int>()
    /// Those of the directory and the tables of dirty bitmaps.
    private(set) var bitmapClusters = Set<Int>()
    /// Bytes of the snapshots' own tables: apart from each other, in order.
    private var snapshotTables: [Range<Int>] = []
    /// Set once the image is found corrupt: nothing is written any more.
    private(set) var writeFailure: BlockError?
    /// It is told once.
    private var corruptionIsTold = false
    /// The header on disk vouches for what the first change makes untrue.
    private(set) var headerIsStale = false
    private var growing: WaitQueue?
    private var headerWriting: WaitQueue?
    /// From here on the file was grown by this driver: bytes that nobody wrote are zeroes.
    private(set) var grownFrom: Int
    private(set) var hasGrown = false

    init(_ node: BlockNode, _ file: Edge, _ header: QCOW2.Header) {
        self.node = node
        self.file = file
        self.header = header
        geometry = header.geometry
        grownFrom = file.size
    }

    // MARK: Header

    /// Writes the header as it stands. Durable only after a flush.
    func writeHeader() async throws(BlockError) {
        // One at a time: an older state must not come to lie over a newer one.
        while let headerWriting { await headerWriting.wait() }
        let queue = WaitQueue()
        headerWriting = queue
        defer {
            headerWriting = nil
            queue.wakeAll()
        }
        let bytes = try header.serialised()
        var padded = bytes
        // Whole sectors: what followed an earlier, longer header goes.
        let length = min((bytes.count + 511) & ~511, geometry.clusterSize)
        padded.append(contentsOf: [UInt8](repeating: 0, count: length - bytes.count))
        let vector = try Self.vector(padded)
        try await file.write(0, from: vector)
    }

    /// A writer clears the bits of what it does not know: from now on that is not true any more.
    func dropUnknownFeatures() {
        guard !header.autoclear.isSubset(of: .known) else { return }
        header.autoclear.formIntersection(.known)
        headerIsStale = true
    }

    /// Brings ``dropUnknownFeatures()`` to disk, before the first change.
    func writeStaleHeader() async throws(BlockError) {
        guard headerIsStale else { return }
        try await writeHeader()
        try await file.flush()
        headerIsStale = false
    }

    static func vector(_ bytes: [UInt8]) throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: bytes.count)
        bytes.withUnsafeBytes { vector.copy(from: $0) }
        return vector
    }

    // MARK: Size of the file

    /// Grows the file so that `[0, end)` can be written.
    ///
    /// In steps: growing waits for the writes that are in flight below.
    func ensureSize(_ end: Int) async throws(BlockError) {
        while end > file.size {
            if let growing {
                await growing.wait()
                continue
            }
            let queue = WaitQueue()
            growing = queue
            defer {
                growing = nil
                queue.wakeAll()
            }
            let step = min(max(1 << 20, file.size / 4), 256 << 20)
            guard let wanted = end.adding(step)?.roundedDown(to: geometry.clusterSize) else {
                throw BlockError(.noSpace, "the image file has no room to grow")
            }
            do throws(BlockError) {
                try await file.resize(to: max(end, wanted))
            } catch  where error.code == .unsupported {
                throw BlockError(
                    .noSpace,
                    "the image needs \(end) bytes, '\(file.node.name)' has \(file.size) "
                        + "and cannot grow", remedy: "give it a larger device")
            }
            hasGrown = true
        }
    }

    /// The file was written by way of others: what lies past its use may not be zeroes.
    func forgetFreshness() { grownFrom = max(grownFrom, file.size) }

    // MARK: Corruption

    func addTable(at offset: Int) { tableClusters.insert(offset >> geometry.clusterBits) }
    func removeTable(at offset: Int) { tableClusters.remove(offset >> geometry.clusterBits) }
    func addBitmapTable(at offset: Int) {
        bitmapClusters.insert(offset >> geometry.clusterBits)
    }
    func removeBitmapTable(at offset: Int) {
        bitmapClusters.remove(offset >> geometry.clusterBits)
    }
    func addRefcountBlock(at offset: Int) {
        refcountClusters.insert(offset >> geometry.clusterBits)
    }

    /// The structure of fixed place that a write of a table at `host` would destroy.
    func fixedOverlap(_ host: Int, _ count: Int) -> String? {
        if host < geometry.clusterSize { return "header" }
        let range = ByteRange(host, count)
        if range.overlaps(ByteRange(header.l1Offset, l1.count << 3)) { return "L1 table" }
        let bytes = header.refcountTableClusters << geometry.clusterBits
        if range.overlaps(ByteRange(header.refcountTableOffset, bytes)) { return "refcount table" }
        return nil
    }

    /// - Parameter tables: in any order; they may overlap.
    func setSnapshotTables(_ tables: [Range<Int>]) {
        snapshotTables = []
        for range in tables.sorted(by: { $0.lowerBound < $1.lowerBound }) where !range.isEmpty {
            if let last = snapshotTables.last, range.lowerBound <= last.upperBound {
                snapshotTables[snapshotTables.count - 1] =
                    last.lowerBound..<max(last.upperBound, range.upperBound)
            } else {
                snapshotTables.append(range)
            }
        }
    }

    /// Whether the range has a byte of a snapshot's own tables.
    func overlapsSnapshotTable(_ range: Range<Int>) -> Bool {
        // The first that ends past the range's start.
        var (low, high) = (0, snapshotTables.count)
        while low < high {
            let middle = (low + high) / 2
            if snapshotTables[middle].upperBound > range.lowerBound {
                high = middle
            } else {
                low = middle + 1
            }
        }
        return low < snapshotTables.count && snapshotTables[low].lowerBound < range.upperBound
    }

    /// Marks the image corrupt on disk and refuses writes from now on.
    ///
    /// - Parameter place: where in the file it was found, if at one place.
    /// - Returns: the error to throw.
    func corruption(_ message: String, at place: ByteRange? = nil) async -> BlockError {
        let error = BlockError(
            .corrupt, message, remedy: "check and repair the image", node: node.name)
        if !corruptionIsTold {
            corruptionIsTold = true
            node.graph.corruptionObserver?(
                node, ImageCorruption(message: message, place: place, isFatal: !node.isReadOnly))
        }
        guard !node.isReadOnly, writeFailure == nil else { return error }
        writeFailure = BlockError(
            .corrupt, "the image was found corrupt and is read-only now: \(message)",
            remedy: "check and repair the image", node: node.name)
        guard header.version == 3 else { return error }
        header.incompatible.insert(.corrupt)
        // The image is refused from here on whether this works or not.
        try? await writeHeader()
        try? await file.flush()
        return error
    }
}
