import BlockCore
import BlockGraph
import BlockIO
import NBDProtocol

/// A node that NBD clients see under a name. Confined to its node's thread, where its seat stands.
public final class NBDExport: NodeUser, @unchecked Sendable {
    public let name: String
    public let description: String
    public let isWritable: Bool
    public let offersAllocationDepth: Bool
    /// What it offers as `qemu:dirty-bitmap:NAME`; they are busy while it is there.
    let bitmaps: [Bitmap]
    /// Its use of the node; `nil` once the export is closed.
    public private(set) var edge: Edge?
    /// Moves with the node. From another thread, go there for whatever is not constant.
    public let seat: IOSeat
    /// It stays on its thread, and keeps the node there.
    public let isFixed: Bool
    private var connections: [NBDConnection] = []
    /// Who waits until the last of them is gone.
    private let departure = WaitQueue()
    var canMultiConnect = true
    /// No client begins to use it any more: it is about to be removed.
    private var isRetired = false

    public var userDescription: String { "NBD export '\(name)'" }
    public var connectionCount: Int { connections.count }

    /// A dirty bitmap and the node that it is on.
    public struct Bitmap {
        public let node: BlockNode
        public let bitmap: DirtyBitmap
        public init(_ bitmap: DirtyBitmap, of node: BlockNode) {
            self.bitmap = bitmap
            self.node = node
        }

        /// The bitmap of that name on `top`, or on the nearest node below that it filters or overlays.
        ///
        /// - Throws: `notFound`.
        public init(named name: String, below top: BlockNode) throws(BlockError) {
            var next: BlockNode? = top
            while let node = next {
                if let found = node.dirtyBitmap(named: name) {
                    self.init(found, of: node)
                    return
                }
                next = (node.filteredChild ?? node.backing)?.node
            }
            throw BlockError(
                .notFound, "neither it nor what is below it has a dirty bitmap '\(name)'",
                node: top.name)
        }
    }

    /// Takes a node for export.
    ///
    /// - Parameters:
    ///   - bitmaps: loaded ones.
    ///   - writeThrough: every write is on stable storage before it is replied to.
    /// - Throws: `readOnly` or `permissionDenied` when the node cannot be used so; also for a bitmap that is
    ///   busy, inconsistent or of another size, or that records what a read-only export is to tell.
    public init(
        name: String, description: String = "", node: BlockNode, writable: Bool,
        allocationDepth: Bool = false, bitmaps: [Bitmap] = [], isFixed: Bool = false,
        writeThrough: Bool = false
    ) throws(BlockError) {
        guard name.utf8.count <= NBDLimits.stringBytesMax,
            description.utf8.count <= NBDLimits.stringBytesMax
        else {
            throw BlockError(
                .invalidArgument,
                "an export's name or description is longer than \(NBDLimits.stringBytesMax) bytes")
        }
        self.name = name
        self.description = description
        isWritable = writable
        offersAllocationDepth = allocationDepth
        self.bitmaps = bitmaps
        self.isFixed = isFixed
        seat = IOSeat(on: node.thread)
        if writable, node.isReadOnly {
            throw BlockError(
                .readOnly, "the node is read-only, the export '\(name)' is to be writable",
                remedy: "export it with writable=off, or open the node with read-only=off",
                node: node.name)
        }
        try Self.checkBitmaps(bitmaps, of: node, writable: writable)
        // Clients of an export cope with other writers, but not with another size.
        edge = try node.graph.attach(
            self, to: node,
            Access(
                uses: writable ? [.consistentRead, .write] : .consistentRead,
                shares: .all.subtracting(.resize)))
        edge?.isWriteThrough = writeThrough
        for exported in bitmaps {
            exported.bitmap.hold(for: userDescription)
            exported.node.hold(userDescription)
        }
    }

    private static func checkBitmaps(
        _ bitmaps: [Bitmap], of node: BlockNode, writable: Bool
    ) throws(BlockError) {
        guard bitmaps.count <= NBDLimits.contextCountMax - 2 else {
            throw BlockError(.exhausted, "\(bitmaps.count) dirty bitmaps are too many to export")
        }
        var names: Set<String> = []
        for exported in bitmaps {
            let bitmap = exported.bitmap
            try bitmap.check([.busy, .inconsistent])
            guard names.insert(bitmap.name).inserted else {
                throw BlockError(
                    .invalidArgument,
                    "two dirty bitmaps '\(bitmap.name)' cannot be told apart by clients")
            }
            guard bitmap.size == node.size else {
                throw BlockError(
                    .invalidArgument,
                    "the dirty bitmap '\(bitmap.name)' is of \(bitmap.size) bytes, the node has "
                        + "\(node.size)", node: node.name)
            }
            // Clients of a read-only export may keep what they were told.
            guard writable || !bitmap.isRecording || exported.node.isReadOnly else {
                throw BlockError(
                    .invalidArgument,
                    "the dirty bitmap '\(bitmap.name)' still records, and the export is read-only",
                    remedy: "disable the bitmap, or export with writable=on", node: node.name)
            }
        }
    }

    func bitmap(named name: String) -> DirtyBitmap? {
        bitmaps.first { $0.bitmap.name.utf8.elementsEqual(name.utf8) }?.bitmap
    }

    /// What a handshake tells of it.
    var info: NBDExportInfo? {
        guard let edge else { return nil }
        var flags: NBDTransmissionFlags = [.sendFlush, .sendFUA, .sendCache]
        if isWritable {
            flags.formUnion([.sendTrim, .sendWriteZeroes, .sendFastZero])
        } else {
            flags.insert(.readOnly)
        }
        // All connections reach the same node: a flush on one covers what was written on any.
        if canMultiConnect { flags.insert(.canMultiConn) }
        let alignment = edge.node.limits.requestAlignment
        let sizes = NBDBlockSizes(
            minimum: Self.blockSize(alignment: alignment, size: edge.size),
            preferred: max(4096, alignment))
        var contexts: [NBDContext] = [.baseAllocation]
        if offersAllocationDepth { contexts.append(.allocationDepth) }
        contexts += bitmaps.map { .dirtyBitmap($0.bitmap.name) }
        return NBDExportInfo(
            name: name, description: description, size: edge.size, flags: flags, blockSizes: sizes,
            contexts: contexts)
    }

    /// The smallest block of an export: the alignment, a power of two, where the size is a number of such
    /// blocks. Clients refuse one that is not; what the node itself needs the engine sees to.
    static func blockSize(alignment: Int, size: Int) -> Int {
        // The lowest bit that is set: the largest power of two that divides the size.
        size == 0 ? alignment : min(alignment, size & -size)
    }

    // MARK: Thread

    public func checkMove(with nodes: [BlockNode]) throws(BlockError) {
        guard !isFixed else {
            throw BlockError(
                .busy, "\(userDescription) was added with fixed-iothread=on",
                remedy: "delete the export first")
        }
        for exported in bitmaps where !nodes.contains(where: { $0 === exported.node }) {
            throw BlockError(
                .busy,
                "\(userDescription) tells of the dirty bitmap '\(exported.bitmap.name)' of node "
                    + "'\(exported.node.name)', which stays")
        }
    }

    public func moves(to thread: IOThread) -> [IOSeat] {
        for connection in connections { connection.move(to: thread) }
        return [seat] + connections.map(\.seat)
    }

    // MARK: Connections

    func add(_ connection: NBDConnection) {
        connections.append(connection)
    }

    func remove(_ connection: NBDConnection) {
        connections.removeAll { $0 === connection }
        if connections.isEmpty { departure.wakeAll() }
    }

    public func nodeResized(_ edge: Edge) {
        for connection in connections { connection.exportResized(to: edge.size) }
    }

    /// Clients that are there were told its size.
    public var reliesOnSize: Bool { !connections.isEmpty }

    /// What a client that has been told `size` sends its requests to.
    ///
    /// - Throws: `disconnected` when it is not for that client any more.
    func edge(ofSize size: Int) throws(BlockError) -> Edge {
        guard let edge, !isRetired else {
            throw BlockError(.disconnected, "the export '\(name)' was removed")
        }
        guard edge.size == size else {
            throw BlockError(
                .disconnected, "the export '\(name)' has another size than the client was told")
        }
        return edge
    }

    /// No client comes in from here on, if none is there.
    ///
    /// - Returns: `false` when clients are there, and nothing has changed.
    public func retireUnused() -> Bool {
        guard connections.isEmpty else { return false }
        isRetired = true
        return true
    }

    /// It is about to be closed: nothing holds back the requests that are waited for then.
    func beginClosing() {
        if let edge { edge.node.graph.beginDetach(edge) }
    }

    /// Ends its connections, waits for their requests, and lets go of the node.
    ///
    /// - Parameter refusing: requests that are held back are refused: while the graph is drained they would
    ///   be waited for in vain.
    public func close(refusing: Bool = false) async throws(BlockError) {
        guard let edge else { return }
        beginClosing()
        if refusing { edge.refuseRequests() }
        self.edge = nil
        for connection in connections { connection.shutdown() }
        while !connections.isEmpty { await departure.wait() }
        for exported in bitmaps {
            exported.bitmap.release(from: userDescription)
            exported.node.release(userDescription)
        }
        let graph = edge.node.graph
        try await graph.detach(edge)
        // The nodes of its bitmaps need not be below any more.
        if !bitmaps.isEmpty { try await graph.collect() }
    }
}
