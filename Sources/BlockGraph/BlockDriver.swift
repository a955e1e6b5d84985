import BlockCore
import BlockIO
import QMP

/// What kind of driver it is: where it may stand in the graph.
public enum DriverKind: Sendable {
    /// Reaches storage; has no data-bearing children.
    case storage
    /// Interprets its child's bytes.
    case format
    /// Presents its child's bytes unchanged.
    case filter
    /// Presents something of its child that is not its bytes: snapshot-access.
    case access
}

/// What a driver type is and can do.
public struct DriverDescription: Sendable {
    /// The name that `driver=` takes.
    public var name: String
    public var kind: DriverKind
    /// Opens a node of this driver. Called on the graph's thread.
    public var open: @Sendable (NodeOpening) async throws(BlockError) -> any BlockDriver
    /// Makes an image; `nil` where the driver cannot.
    public var create: (@Sendable (ImageCreation) async throws(BlockError) -> Void)?
    /// A filter's child is its `backing`, not its `file`.
    public var filtersBacking: Bool
    /// How sure the driver is that an image that begins with these bytes is its own: 0…100.
    public var probe: (@Sendable (UnsafeRawBufferPointer) -> Int)?
    /// Whether images of this format can have a backing image.
    public var supportsBacking: Bool
    /// Works out the storage that an image made with creation options will take; `nil` where the
    /// driver cannot.
    public var measure: (@Sendable (OptionReader) throws(BlockError) -> StorageNeed)?

    public init(
        name: String, kind: DriverKind,
        open: @escaping @Sendable (NodeOpening) async throws(BlockError) -> any BlockDriver,
        create: (@Sendable (ImageCreation) async throws(BlockError) -> Void)? = nil,
        filtersBacking: Bool = false,
        probe: (@Sendable (UnsafeRawBufferPointer) -> Int)? = nil,
        supportsBacking: Bool = false,
        measure: (@Sendable (OptionReader) throws(BlockError) -> StorageNeed)? = nil
    ) {
        self.name = name
        self.kind = kind
        self.open = open
        self.create = create
        self.filtersBacking = filtersBacking
        self.probe = probe
        self.supportsBacking = supportsBacking
        self.measure = measure
    }
}

/// One open node's driver.
///
/// Thread rule: everything is called on the thread of the graph, which may be another one after a drain: ask
/// the node each time (``BlockNode/thread``), and start what may outlast a request by its ``BlockNode/seat``. Requests that arrive here crossed an
/// edge: within the node's size, aligned to its limits, permitted. They reach children through
/// `Edge`s, never directly. Several are in flight at once; between two `await`s nothing else runs.
///
/// A driver whose promise could break by forwarding (a filter, above all) must say what happens to
/// writes, zeroes, discards and resizes: none of these has a default.
public protocol BlockDriver: AnyObject, Sendable {
    /// The bytes at `offset`, into all of `vector`.
    func read(_ offset: Int, into vector: IOVector, _ flags: ReadFlags) async throws(BlockError)

    /// ``read(_:into:_:)`` without waiting: for what is in memory already.
    ///
    /// A filter that only forwards reads may forward these too; there is no default that does it, so
    /// that nothing passes a filter by.
    ///
    /// - Returns: `false`, and anything in `vector`, where that is not possible: `read` does it then,
    ///   and says what is wrong, if something is.
    func readNow(_ offset: Int, into vector: IOVector) -> Bool

    /// ``write(_:from:_:)`` without waiting and without flags, as ``readNow(_:into:)`` is to `read`.
    ///
    /// - Returns: `false` where that is not possible: a part may be written, and `write` is called with
    ///   the same bytes.
    func writeNow(_ offset: Int, from vector: IOVector) -> Bool

    /// `flags` holds `fua` only when ``supportsFUA`` says so; dispatch flushes otherwise.
    func write(_ offset: Int, from vector: IOVector, _ flags: WriteFlags) async throws(BlockError)

    /// Makes `range` read as zeroes.
    ///
    /// - Throws: `unsupported` where that is no faster than writing: dispatch then writes zeroes,
    ///   unless `noFallback` forbids it.
    func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError)

    /// The data in `range` is not needed any more. A hint: afterwards it reads as anything that it
    /// ever was, or zeroes, but stays the same until it is written.
    ///
    /// - Throws: `unsupported` where nothing can be given back.
    func discard(_ range: ByteRange) async throws(BlockError)

    /// Everything written before is on stable storage on return. Children are the driver's to flush.
    func flush() async throws(BlockError)

    /// What is known of the bytes from `range.offset` on: one run of at most `range`, or as many as are at
    /// hand and `answer` takes.
    ///
    /// An error after the first run loses nothing: the caller takes what is there.
    ///
    /// - Parameters:
    ///   - precise: the caller wants to know about zeroes, at the price of asking storage.
    ///   - answer: empty.
    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError)

    /// Where the storage below holds `range`, byte for byte; for copies that read nothing.
    ///
    /// - Throws: `unsupported`, the default.
    func locate(_ range: ByteRange) throws(BlockError) -> StoredRange

    /// Copies stored bytes to `offset` without reading them.
    ///
    /// - Throws: `unsupported`, the default: the caller reads and writes then.
    func copyRange(
        from stored: StoredRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError)

    /// Changes the size. Bytes that appear read as zeroes.
    func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError)

    /// Reads saved state of a machine, which is kept beside the disk: see ``Edge/readMachineState(_:into:)``.
    func readMachineState(_ offset: Int, into vector: IOVector) async throws(BlockError)

    /// Writes saved state of a machine. Called while no other write of the node is in flight.
    func writeMachineState(_ offset: Int, from vector: IOVector) async throws(BlockError)

    /// Looks for damage in the image's own structures, and repairs it if asked; see ``Edge/check(_:_:)``.
    func check(
        _ repair: CheckRepair, _ notice: @escaping CheckNotice
    ) async throws(BlockError) -> CheckReport

    /// The snapshot that this node gives access to, if it does.
    var snapshotSource: (any SnapshotSource)? { get }

    /// The snapshots that the image holds inside itself, if it can.
    var snapshotStore: (any InternalSnapshotStore)? { get }

    /// Whether `write` and `writeZeroes` take `fua`.
    var supportsFUA: Bool { get }

    /// Whether `write` takes `compressed`; dispatch refuses it otherwise, and hands it over in one
    /// piece, as it was asked for.
    var supportsCompressedWrites: Bool { get }

    /// Whether its failures stand for those of storage: a flush of it that fails has lost what was written.
    var simulatesStorage: Bool { get }

    /// What keeps the node's persistent dirty bitmaps, where the format can.
    var bitmapStore: (any BitmapStore)? { get }

    /// What the node needs of the child behind `edge`, given what its own users do and allow.
    func access(to edge: Edge, for users: Access) -> Access

    /// May the node be used so? Called before any change of permissions takes effect.
    func checkAccess(_ access: Access) throws(BlockError)
    /// It is used so from now on; or, when `checkAccess` passed but another node refused, it is not.
    func applyAccess(_ access: Access)
    func abortAccess()

    /// `node` is to take the place of the child behind `edge`.
    ///
    /// What holds a driver's metadata stays, by default: what the driver has in memory of it is about these
    /// bytes and no others. Only a node that has the same takes its place: a filter above it, the node below
    /// such a filter, another node on the same file.
    ///
    /// - Throws: where the driver's promises would not outlive that.
    func checkReplacement(of edge: Edge, with node: BlockNode) throws(BlockError)

    /// The bytes behind `edge` are about to become others at one go: the child, or a node further below, is
    /// replaced by one that does not have the same, or comes or goes. Asked after
    /// ``checkReplacement(of:with:)``, and of every node above.
    ///
    /// What holds a driver's metadata stays, by default.
    ///
    /// - Throws: where somebody relies on what is there.
    func checkOtherBytes(behind edge: Edge) throws(BlockError)

    /// The child whose bytes are the node's, all of them from the first on, where the driver is no filter.
    var wholeChild: Edge? { get }
    /// The child whose bytes, or a part of them, are the node's, and where in it the first one is, where the
    /// driver is no filter.
    var shownChild: (edge: Edge, offset: Int)? { get }

    /// Whether both are on the same storage: one file that is open twice.
    func isSameStorage(as other: any BlockDriver) -> Bool

    /// A transaction of several changes is through, or undone: what ``applyAccess(_:)`` left open while
    /// ``BlockNode/isInTransaction`` is decided now. Requests are still held back.
    func transactionEnds()

    /// The node behind `edge` has another size now.
    func childResized(_ edge: Edge)
    /// The node behind `edge` takes other alignments or sizes of requests now.
    func childLimitsChanged(_ edge: Edge)

    /// Makes ready for other options; nothing changes before ``DriverReopening/commit``.
    ///
    /// Called while the node is drained and flushed, after its children were made ready. Without an
    /// implementation the driver's own options have to stay as they are.
    ///
    /// - Throws: when the driver cannot go on so.
    func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening

    /// Whether it stops waiting for requests to a child after some time. When that changes, it calls
    /// ``BlockNode/timeLimitChanged()`` of the child.
    func limitsTime(of edge: Edge) -> Bool

    /// From now on no request is to be held back, and those that are go on: somebody waits until none
    /// is in flight. Nests; each is followed by its ``drainEnds()``.
    func drainBegins()
    func drainEnds()

    /// Finishes internal work that is under way; no requests of users are.
    func settle() async
    /// Whether there is none, so that ``settle()`` would return at once.
    var isSettled: Bool { get }

    /// The node, drained, is to go on on another thread, together with `nodes`, all that it is joined to.
    ///
    /// - Throws: why it cannot.
    func checkMove(with nodes: [BlockNode]) throws(BlockError)
    /// It goes on there. What it has of its own that belongs to a thread goes along; tasks of
    /// ``BlockNode/seat`` do so by themselves.
    func moves(to thread: IOThread)

    /// Changes properties of the image; see ``BlockGraph/amend(_:_:)``. No requests of users are in
    /// flight.
    func amend(_ amendment: ImageAmendment) async throws(BlockError)

    var information: NodeInformation { get async throws(BlockError) }
    /// The name people know the image by, as `json:{…}` when nothing plainer says it all.
    var filename: String { get }

    /// Writes everything out and lets go of resources. Called once, with nothing in flight.
    ///
    /// - Throws: when something could not be made durable; the node is closed all the same.
    func close() async throws(BlockError)
}

extension BlockDriver {
    public func locate(_ range: ByteRange) throws(BlockError) -> StoredRange {
        throw BlockError(.unsupported, "the driver's bytes have no place of their own")
    }
    public func copyRange(
        from stored: StoredRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError) {
        throw BlockError(.unsupported, "the driver cannot copy within its storage")
    }
    public func readMachineState(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        throw BlockError(.unsupported, "the driver keeps no saved state of a machine")
    }
    public func writeMachineState(_ offset: Int, from vector: IOVector) async throws(BlockError) {
        throw BlockError(.unsupported, "the driver keeps no saved state of a machine")
    }
    public var snapshotSource: (any SnapshotSource)? { nil }
    public var snapshotStore: (any InternalSnapshotStore)? { nil }
    public func readNow(_ offset: Int, into vector: IOVector) -> Bool { false }
    public func writeNow(_ offset: Int, from vector: IOVector) -> Bool { false }
    public var supportsFUA: Bool { false }
    public var supportsCompressedWrites: Bool { false }
    public var simulatesStorage: Bool { false }
    public var bitmapStore: (any BitmapStore)? { nil }
    public func checkAccess(_ access: Access) throws(BlockError) {}
    public func applyAccess(_ access: Access) {}
    public func abortAccess() {}
    public func checkReplacement(of edge: Edge, with node: BlockNode) throws(BlockError) {
        if edge.roles.contains(.metadata) { try edge.requireSameBytes(in: node) }
    }
    public func checkOtherBytes(behind edge: Edge) throws(BlockError) {
        if edge.roles.contains(.metadata) { try edge.refuseOtherBytes() }
    }
    public var wholeChild: Edge? { nil }
    public var shownChild: (edge: Edge, offset: Int)? { wholeChild.map { ($0, 0) } }
    public func isSameStorage(as other: any BlockDriver) -> Bool { other === self }
    public func transactionEnds() {}
    public func childResized(_ edge: Edge) {}
    public func limitsTime(of edge: Edge) -> Bool { false }
    public func drainBegins() {}
    public func drainEnds() {}
    public func childLimitsChanged(_ edge: Edge) {}
    public func settle() async {}
    public var isSettled: Bool { true }
    public func checkMove(with nodes: [BlockNode]) throws(BlockError) {}
    public func moves(to thread: IOThread) {}
    public func amend(_ amendment: ImageAmendment) async throws(BlockError) {
        throw BlockError(.unsupported, "images of this driver cannot be amended")
    }
    public var information: NodeInformation {
        get async throws(BlockError) { NodeInformation() }
    }
    public func close() async throws(BlockError) {}
}

/// A driver that presents its only child's bytes: reads, flushes and status pass through.
public protocol FilterDriver: BlockDriver {
    /// The filtered child.
    var child: Edge { get }
}

extension FilterDriver {
    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        try await child.read(offset, into: vector, flags)
    }

    public func flush() async throws(BlockError) {
        try await child.flush()
    }

    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        try await child.forwardStatus(range, precise: precise, into: answer)
    }

    public var supportsFUA: Bool { true }
    public var supportsCompressedWrites: Bool { child.node.driver.supportsCompressedWrites }

    public func access(to edge: Edge, for users: Access) -> Access {
        // A filter does with its child what is done with it, and nothing else.
        users
    }

    public func childResized(_ edge: Edge) {
        edge.parentNode?.size = edge.node.size
    }

    public func childLimitsChanged(_ edge: Edge) {
        if edge === child { edge.parentNode?.limits = edge.node.limits }
    }

    public var filename: String { child.node.driver.filename }

    public var information: NodeInformation {
        get async throws(BlockError) {
            var information = NodeInformation()
            information.clusterSize = try await child.node.driver.information.clusterSize
            return information
        }
    }
}

/// Gives access to a point in time of a node: what snapshot-access reads.
public protocol SnapshotSource: AnyObject {
    /// The snapshot's own size.
    var snapshotSize: Int { get }
    func readSnapshot(_ offset: Int, into vector: IOVector) async throws(BlockError)
    /// ``readSnapshot(_:into:)`` without waiting, as ``BlockDriver/readNow(_:into:)``.
    func readSnapshotNow(_ offset: Int, into vector: IOVector) -> Bool
    /// As ``BlockDriver/blockStatus(_:precise:into:)``, over the whole chain.
    func snapshotStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError)
    /// That part of the snapshot is not needed any more; its space is given back.
    func discardSnapshot(_ range: ByteRange) async throws(BlockError)
    /// Nobody reads it any more.
    func close()
}

extension SnapshotSource {
    public func close() {}
    public func readSnapshotNow(_ offset: Int, into vector: IOVector) -> Bool { false }
}
