import BlockCore
import BlockGraph
import BlockIO
import NBDProtocol

/// A node that NBD clients see under a name. Confined to the graph's thread.
public final class NBDExport: NodeUser, @unchecked Sendable {
    public let name: String
    public let description: String
    public let isWritable: Bool
    public let offersAllocationDepth: Bool
    /// Its use of the node; `nil` once the export is closed.
    public private(set) var edge: Edge?
    let graph: BlockGraph
    private var connections: [NBDConnection] = []
    private var sleepers: [UnsafeContinuation<Void, Never>] = []
    var canMultiConnect = true

    public var userDescription: String { "NBD export '\(name)'" }
    public var connectionCount: Int { connections.count }

    /// Takes a node for export.
    ///
    /// - Throws: `readOnly` or `permissionDenied` when the node cannot be used so.
    public init(
        name: String, description: String = "", node: BlockNode, writable: Bool,
        allocationDepth: Bool = false
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
        graph = node.graph
        if writable, node.isReadOnly {
            throw BlockError(
                .readOnly, "the node is read-only, the export '\(name)' is to be writable",
                remedy: "export it with writable=off, or open the node with read-only=off",
                node: node.name)
        }
        // Clients of an export cope with other writers, but not with another size.
        edge = try node.graph.attach(
            self, to: node,
            Access(
                uses: writable ? [.consistentRead, .write] : .consistentRead,
                shares: .all.subtracting(.resize)))
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
        let limits = edge.node.limits
        let sizes = NBDBlockSizes(
            minimum: limits.requestAlignment,
            preferred: max(4096, limits.requestAlignment))
        var contexts: [NBDContext] = [.baseAllocation]
        if offersAllocationDepth { contexts.append(.allocationDepth) }
        return NBDExportInfo(
            name: name, description: description, size: edge.size, flags: flags, blockSizes: sizes,
            contexts: contexts)
    }

    // MARK: Connections

    func add(_ connection: NBDConnection) {
        connections.append(connection)
    }

    func remove(_ connection: NBDConnection) {
        connections.removeAll { $0 === connection }
        guard connections.isEmpty else { return }
        let woken = sleepers
        sleepers = []
        for continuation in woken { continuation.resume() }
    }

    public func nodeResized(_ edge: Edge) {
        for connection in connections { connection.exportResized(to: edge.size) }
    }

    /// Ends its connections, waits for their requests, and lets go of the node.
    public func close() async throws(BlockError) {
        guard let edge else { return }
        self.edge = nil
        for connection in connections { connection.shutdown() }
        while !connections.isEmpty {
            await withUnsafeContinuation { sleepers.append($0) }
        }
        try await graph.detach(edge)
    }
}
