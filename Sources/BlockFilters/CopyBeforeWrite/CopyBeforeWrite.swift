import BlockCore
import BlockGraph
import BlockIO
import QMP

/// `copy-before-write`: before a guest write changes a cluster for the first time, the old data is
/// copied to `target`. The node's snapshot is the state of `file` at the moment it was inserted.
///
///     guest ──► copy-before-write ──file──► active disk
///                     │
///                     └──────────target──► temporary image ◄── copied clusters
///
/// Per cluster:
///
///     waiting ──copy done──► copied          a cluster not in the snapshot (option `bitmap`, or
///        └──────discard────► dropped         discarded) is dropped: reads of it are refused
///
/// Invariants:
/// 1. A guest's change of a cluster that waits is issued only after the cluster's copy is in the
///    target (`copied`), or the snapshot is broken.
/// 2. While a snapshot read reads a cluster from `file`, no guest write to that cluster is issued.
///    While a cluster is copied, neither a second copy nor a guest write of it begins.
/// 3. Once broken, the snapshot stays broken: every access to it fails, and guests are on their own.
///
/// All state changes between two `await`s: the thread is the lock.
public final class CopyBeforeWrite: FilterDriver, SnapshotSource, @unchecked Sendable {
    enum OnError: String, Sendable, CaseIterable {
        case breakGuestWrite = "break-guest-write"
        case breakSnapshot = "break-snapshot"
    }

    /// Clusters are at least this large, as in QEMU: smaller ones cost more in copies than in space.
    static let clusterSizeMin = 64 << 10
    static let clusterSizeMax = 1 << 30
    /// Bytes that a copy holds in memory, however large the clusters are.
    static let pieceMax = 1 << 20
    /// Bytes of zeroes that are noted in the target at a time.
    private static let zeroesMax = 1 << 30

    let node: BlockNode
    public let child: Edge
    let target: Edge
    let clusterSize: Int
    /// The target's image names a backing file, which may have been left out.
    private var targetNamesBacking = true
    private var onError: OnError
    private var timeoutNanoseconds: UInt64

    /// Clusters whose old data must be copied before they change.
    var waiting: ClusterBitmap
    /// Clusters that the snapshot has: waiting in `file`, or copied.
    var present: ClusterBitmap
    /// Clusters held by copies and snapshot reads.
    let locks = RangeLocks()
    public let snapshotSize: Int
    /// Why the snapshot is broken, once it is.
    public private(set) var breakage: BlockError?
    /// Copies that go on although the write that wanted them stopped waiting.
    private var copiesInFlight = 0
    private let copyEnd = WaitQueue()

    /// It has been used: it has to stay in every guest's way.
    private var hadUsers = false

    public private(set) var copiedBytes = 0

    private init(
        node: BlockNode, child: Edge, target: Edge, clusterSize: Int, onError: OnError,
        timeoutNanoseconds: UInt64
    ) throws(BlockError) {
        self.node = node
        self.child = child
        self.target = target
        self.clusterSize = clusterSize
        self.onError = onError
        self.timeoutNanoseconds = timeoutNanoseconds
        snapshotSize = child.size
        guard let count = ClusterBitmap.count(covering: child.size, unit: clusterSize) else {
            throw BlockError(
                .exhausted,
                "a disk of \(child.size) bytes has too many clusters of \(clusterSize) bytes",
                remedy: "use a larger min-cluster-size")
        }
        waiting = ClusterBitmap(count: count, repeating: true)
        present = ClusterBitmap(count: count, repeating: true)
        node.size = child.size
        node.limits = child.node.limits
    }

    // MARK: Open

    static func open(_ opening: NodeOpening) async throws(BlockError) -> CopyBeforeWrite {
        let options = opening.options
        let (onError, timeout) = try policy(options, opening.node.options)
        let clusterSizeMin = try options.size("min-cluster-size") ?? 0
        guard clusterSizeMin == 0 || clusterSizeMin.isPowerOfTwo, clusterSizeMin <= clusterSizeMax
        else {
            throw BlockError(
                .invalidArgument,
                "'min-cluster-size' must be a power of two up to \(clusterSizeMax), not "
                    + "\(clusterSizeMin)")
        }
        let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
        let target = try await opening.requiredChild("target", roles: .data)
        guard target.size >= child.size else {
            throw BlockError(
                .invalidArgument,
                "the target '\(target.node.name)' (\(target.size) bytes) is smaller than the disk "
                    + "'\(child.node.name)' (\(child.size) bytes)",
                remedy: "make the target at least as large as the disk")
        }
        let targetInformation = try await target.node.driver.information
        let clusterSize = max(
            Self.clusterSizeMin, max(clusterSizeMin, targetInformation.clusterSize))
        let filter = try CopyBeforeWrite(
            node: opening.node, child: child, target: target, clusterSize: clusterSize,
            onError: onError, timeoutNanoseconds: timeout)
        filter.targetNamesBacking = targetInformation.backingName != nil
        if let bitmap = try options.value("bitmap") {
            try await filter.restrict(to: bitmap, opening)
        }
        return filter
    }

    /// What happens when a copy fails, and how long it may take, in nanoseconds.
    private static func policy(
        _ options: OptionReader, _ nodeOptions: NodeOptions
    ) throws(BlockError) -> (OnError, timeoutNanoseconds: UInt64) {
        if nodeOptions.sharesAll {
            throw BlockError(
                .invalidArgument, "force-share=on would let others change what is frozen")
        }
        let onError = try options.enumeration("on-cbw-error", as: OnError.self) ?? .breakGuestWrite
        let timeout = try options.int("cbw-timeout") ?? 0
        guard timeout >= 0, timeout <= Int(UInt32.max) else {
            throw BlockError(.invalidArgument, "'cbw-timeout' is out of bounds: \(timeout) seconds")
        }
        return (onError, UInt64(timeout) * 1_000_000_000)
    }

    /// What happens on errors can change; the snapshot is what it is.
    public func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening {
        let (onError, timeout) = try Self.policy(reopening.options, reopening.nodeOptions)
        for key in ["bitmap", "min-cluster-size"] { try reopening.requireUnchanged(key) }
        var result = DriverReopening()
        result.commit = {
            self.onError = onError
            self.timeoutNanoseconds = timeout
            self.target.node.timeLimitChanged()
        }
        return result
    }

    /// Only clusters that the dirty bitmap names belong to the snapshot.
    private func restrict(
        to option: JSONValue, _ opening: NodeOpening
    ) async throws(BlockError) {
        let reader = try OptionReader(option, of: "option 'bitmap'")
        guard let nodeName = try reader.string("node"), let name = try reader.string("name") else {
            throw BlockError(.invalidArgument, "option 'bitmap' needs 'node' and 'name'")
        }
        try reader.finish()
        let bitmap = try opening.graph.requireDirtyBitmap(node: nodeName, name: name)
        await bitmap.load()
        try bitmap.check([.busy, .inconsistent])
        guard bitmap.size == snapshotSize else {
            throw BlockError(
                .invalidArgument,
                "the dirty bitmap '\(name)' is for \(bitmap.size) bytes, the disk has \(snapshotSize)"
            )
        }
        var wanted = ClusterBitmap(count: present.count)
        bitmap.forEachDirtyRange { range in
            wanted.set(clusters(touching: range))
        }
        waiting = wanted
        present = wanted
    }

    // MARK: Access

    public func access(to edge: Edge, for users: Access) -> Access {
        if edge === child {
            // Nobody uses the node yet: it is about to be put in the place of the disk, whose users go
            // on. From the first user on, the old data is read whatever the users do, and nobody else
            // may change what is frozen: neither past this node nor by another size.
            if node.parents.isEmpty { return Access(uses: [], shares: .all.subtracting(.resize)) }
            var access = users
            access.uses.insert(.consistentRead)
            access.shares.subtract([.write, .resize])
            return access
        }
        // The target: others may write to it (discards through a format above), none may resize it.
        return Access(uses: [.consistentRead, .write], shares: .all.subtracting(.resize))
    }

    public func limitsTime(of edge: Edge) -> Bool {
        edge === target && timeoutNanoseconds > 0
    }

    public func applyAccess(_ access: Access) {
        if !node.parents.isEmpty {
            hadUsers = true
        } else if !node.isInTransaction {
            breakIfUnused()
        }
    }

    public func transactionEnds() {
        breakIfUnused()
    }

    /// Without users the disk may change past this node: what still waits is not frozen.
    private func breakIfUnused() {
        guard hadUsers, node.parents.isEmpty else { return }
        breakSnapshot(BlockError(.cancelled, "the last user of the node left"))
    }

    public func checkReplacement(of edge: Edge, with node: BlockNode) throws(BlockError) {
        throw BlockError(
            .unsupported,
            "the snapshot is made of this '\(edge.name)': no other can take its place",
            remedy: "end the snapshot first")
    }

    /// What was not copied yet is read below, and frozen there.
    public func checkOtherBytes(behind edge: Edge) throws(BlockError) {
        guard edge === child, breakage == nil, !node.parents.isEmpty else { return }
        throw BlockError(
            .busy, "its snapshot has data in '\(edge.node.name)', whose bytes would become others",
            remedy: "end the snapshot first", node: node.name)
    }

    public func childResized(_ edge: Edge) {
        // The access to both children keeps others from it; whoever manages it anyway ends the snapshot.
        if child.size < snapshotSize || target.size < snapshotSize {
            breakSnapshot(BlockError(.corrupt, "'\(edge.node.name)' has shrunk"))
        }
    }

    // MARK: Guest requests

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await copyBefore(ByteRange(offset, vector.count))
        try await child.write(offset, from: vector, flags)
    }

    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        child.readNow(offset, into: vector)
    }

    /// Only where nothing is left to be copied, nor anybody reads what is to change.
    public func writeNow(_ offset: Int, from vector: IOVector) -> Bool {
        let clusters = clusters(touching: ByteRange(offset, vector.count))
        guard waiting.firstSet(in: clusters) == nil,
            !locks.conflicts(clusters, exclusively: true)
        else { return false }
        return child.writeNow(offset, from: vector)
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await copyBefore(range)
        try await child.writeZeroes(range, flags)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await copyBefore(range)
        try await child.discard(range)
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        throw BlockError(
            .unsupported, "the disk cannot be resized while its snapshot is held",
            remedy: "end the snapshot first")
    }

    public func flush() async throws(BlockError) {
        // What the snapshot has is only as durable as the process: the target is flushed with the
        // disk, so that a user who keeps it finds all of it. What the guest wrote is safe or not
        // whatever becomes of that.
        if breakage == nil { await flushTarget() }
        try await child.flush()
    }

    /// A flush that failed in storage may have lost copies that were made before: no failed guest request
    /// brings them back, so that the snapshot is broken whatever the policy. One that is late, or found
    /// no space for the tables of copies that never came about, has lost nothing: the snapshot goes
    /// on, unless it is to be broken by the first failure.
    private func flushTarget() async {
        do throws(BlockError) {
            try await withDeadline { () throws(BlockError) in
                do throws(BlockError) {
                    try await self.target.flush()
                } catch {
                    if self.target.node.hasLostWrites { self.breakSnapshot(error) }
                    throw error
                }
            }
        } catch {
            if onError == .breakSnapshot { breakSnapshot(error) }
        }
    }

    // MARK: Copying

    @inline(__always)
    func clusters(touching range: ByteRange) -> Range<Int> {
        let first = range.offset / clusterSize
        return first..<(range.isEmpty ? first : (range.end - 1) / clusterSize + 1)
    }

    /// Returns when the guest may change `range`.
    ///
    /// - Throws: when a copy failed or took too long and the policy is to fail the guest's write.
    private func copyBefore(_ range: ByteRange) async throws(BlockError) {
        let clusters = clusters(touching: range)
        // Most writes hit clusters that are done with.
        if waiting.firstSet(in: clusters) == nil, !locks.conflicts(clusters, exclusively: true) {
            return
        }
        if breakage == nil {
            do throws(BlockError) {
                try await copyWithDeadline(clusters)
            } catch {
                if onError == .breakGuestWrite { throw error }
                breakSnapshot(error)
            }
        }
        // Snapshot reads of `file` come first (invariant 2). Those of a broken snapshot fail anyway, and
        // a copy that hangs must not hold the guest up.
        if breakage == nil { await locks.waitUntilFree(clusters, exclusively: true) }
    }

    private func breakSnapshot(_ error: BlockError) {
        guard breakage == nil else { return }
        breakage = BlockError(
            .permissionDenied, "the snapshot is broken: \(error.message)",
            remedy: "make a new snapshot"
                + (onError == .breakGuestWrite
                    ? ""
                    : "; on-cbw-error=break-guest-write fails guest writes where a copy fails, and "
                        + "keeps the snapshot"),
            node: node.name)
        // Nothing is to be copied any more.
        waiting = ClusterBitmap(count: waiting.count)
        // Nor does anybody wait for a copy that may never end.
        locks.wake()
        copyEnd.wakeAll()
    }

    private func copyWithDeadline(_ clusters: Range<Int>) async throws(BlockError) {
        try await withDeadline { () throws(BlockError) in try await self.copy(clusters) }
    }

    /// Waits for work on the target, no longer than `cbw-timeout`; past that it goes on by itself.
    private func withDeadline(
        _ work: @escaping @Sendable () async throws(BlockError) -> Void
    ) async throws(BlockError) {
        guard timeoutNanoseconds > 0 else {
            try await work()
            return
        }
        let race = CopyRace(on: node.seat)
        copiesInFlight += 1
        node.seat.spawn {
            do throws(BlockError) {
                try await work()
                race.finish(nil)
            } catch {
                race.finish(error)
            }
            self.copyEnded()
        }
        try await race.wait(nanoseconds: timeoutNanoseconds)
    }

    private func copyEnded() {
        copiesInFlight -= 1
        copyEnd.wakeAll()
    }

    /// Copies what waits in `clusters`, part by part; others get their turn in between.
    private func copy(_ clusters: Range<Int>) async throws(BlockError) {
        let pieceCount = max(1, Self.pieceMax / clusterSize)
        var rest = clusters
        while let first = waiting.firstSet(in: rest) {
            // Of long changes much may be zeroes, which need not be read. What waits does not change meanwhile.
            let zeroEnd =
                clusters.count > pieceCount
                ? await endOfZeroes(in: first..<clusters.upperBound) : first
            if breakage != nil { return }
            let end = zeroEnd > first ? zeroEnd : min(first + pieceCount, clusters.upperBound)
            let part = first..<(waiting.firstClear(in: first..<end) ?? end)
            // It was copied while zeroes were looked for.
            if part.isEmpty { continue }
            if locks.conflicts(part, exclusively: false) {
                // Somebody copies a part of it already; look again when that is over.
                await locks.untilChange()
                continue
            }
            locks.take(part, exclusively: true)
            do throws(BlockError) {
                if zeroEnd > first {
                    try await copyZeroes(part)
                } else {
                    try await copyRun(part)
                }
            } catch {
                locks.unlock(part, exclusively: true)
                throw error
            }
            waiting.clear(part)
            locks.unlock(part, exclusively: true)
            rest = part.upperBound..<clusters.upperBound
            if !rest.isEmpty { await Task.yield() }
        }
    }

    /// Up to where the clusters are known to read as zeroes: the first one where they are not.
    private func endOfZeroes(in clusters: Range<Int>) async -> Int {
        let count = min(clusters.count, max(1, Self.zeroesMax / clusterSize))
        let asked = clusters.lowerBound..<clusters.lowerBound + count
        let range = bytes(of: asked)
        // Whatever cannot be told is read.
        guard let status = try? await child.chainStatus(range, precise: false),
            status.flags.contains(.zero)
        else { return clusters.lowerBound }
        return status.count >= range.count
            ? asked.upperBound : (range.offset + status.count) / clusterSize
    }

    private func copyZeroes(_ clusters: Range<Int>) async throws(BlockError) {
        let range = bytes(of: clusters)
        TracePoint.cbwCopy("node \(node.name) offset \(range.offset) bytes \(range.count)")
        try await zeroTarget(range)
        copiedBytes += range.count
    }

    /// Whether an image's zeroes are its own. What it shows of a backing image may change: that may be the disk.
    private func isOnItsOwn(_ image: BlockNode) -> Bool {
        !targetNamesBacking && image.backing == nil && image.description.supportsBacking
    }

    /// Notes zeroes in the target, where it does not have them anyway: a fresh image then needs no tables for them.
    private func zeroTarget(_ range: ByteRange) async throws(BlockError) {
        if isOnItsOwn(target.node),
            let status = try? await target.chainStatus(range, precise: false),
            status.flags.contains(.zero), status.count >= range.count
        {
            return
        }
        try await target.writeZeroes(range, .mayUnmap)
    }

    private func copyRun(_ clusters: Range<Int>) async throws(BlockError) {
        let range = bytes(of: clusters)
        TracePoint.cbwCopy("node \(node.name) offset \(range.offset) bytes \(range.count)")
        let memory = try IOVector(allocating: min(range.count, Self.pieceMax))
        var offset = range.offset
        while offset < range.end, breakage == nil {
            if offset > range.offset { await Task.yield() }
            let piece = ByteRange(offset, min(range.end - offset, Self.pieceMax))
            try await copyPiece(piece, through: memory.slice(0, piece.count))
            offset = piece.end
        }
    }

    private func copyPiece(_ piece: ByteRange, through memory: IOVector) async throws(BlockError) {
        try await child.read(piece.offset, into: memory)
        if memory.isZero {
            try await zeroTarget(piece)
        } else {
            try await target.write(piece.offset, from: memory)
        }
        copiedBytes += piece.count
    }

    /// The bytes of clusters; the last one may be short.
    func bytes(of clusters: Range<Int>) -> ByteRange {
        ByteRange(
            from: clusters.lowerBound * clusterSize,
            to: clusters.upperBound == present.count
                ? snapshotSize : clusters.upperBound * clusterSize)
    }

    public func settle() async {
        while !isSettled { await copyEnd.wait() }
    }
    /// What goes on for a snapshot that is broken may never end: guests do not wait for it.
    public var isSettled: Bool { copiesInFlight == 0 || breakage != nil }

    public func checkMove(with nodes: [BlockNode]) throws(BlockError) {
        guard copiesInFlight == 0 else {
            throw BlockError(.busy, "copies to its target are still under way")
        }
    }

    public func close() async throws(BlockError) {
        while copiesInFlight > 0 { await copyEnd.wait() }
    }
}

extension CopyBeforeWrite {
    public static let driver = DriverDescription(
        name: "copy-before-write", kind: .filter,
        open: { opening throws(BlockError) in try await CopyBeforeWrite.open(opening) })
}
