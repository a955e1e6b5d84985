import BlockCore
import BlockGraph
import QMP

/// `snapshot-access`: the snapshot that its child gives access to, as a node to read.
///
/// The snapshot is the one point in time that the child keeps (copy-before-write), or, named by
/// `snapshot-name` or `snapshot-id`, one that the child's image holds inside itself (qcow2).
///
/// It reads only through the child's snapshot interface, never the child's own data, and takes no
/// permission on the child: the frozen state does not depend on what happens to the live one.
/// Discarding drops a part of the snapshot that is not needed any more.
public final class SnapshotAccess: BlockDriver, @unchecked Sendable {
    private let file: Edge
    private let source: any SnapshotSource

    private init(_ node: BlockNode, _ file: Edge, _ source: any SnapshotSource) {
        self.file = file
        self.source = source
        node.size = source.snapshotSize
        node.limits.requestAlignment = file.node.limits.requestAlignment
        node.limits.memoryAlignment = file.node.limits.memoryAlignment
        node.limits.allocationUnit = file.node.limits.allocationUnit
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> SnapshotAccess {
        let file = try await opening.requiredChild("file", roles: [.data, .primary])
        let selector = SnapshotSelector(
            identifier: try opening.options.string("snapshot-id"),
            name: try opening.options.string("snapshot-name"))
        if selector.identifier == nil, selector.name == nil {
            return SnapshotAccess(opening.node, file, try file.snapshotSource())
        }
        let store = try file.node.requireSnapshotStore()
        guard let snapshot = store.snapshot(selector) else {
            throw BlockError(
                .notFound, "'\(file.node.name)' has no internal snapshot \(selector.text)")
        }
        let source = try await store.openSnapshot(snapshot.identifier, for: opening.node)
        return SnapshotAccess(opening.node, file, source)
    }

    public func close() async throws(BlockError) {
        source.close()
    }

    public func access(to edge: Edge, for users: Access) -> Access {
        .none
    }

    public func checkReplacement(of edge: Edge, with node: BlockNode) throws(BlockError) {
        throw BlockError(
            .unsupported, "the snapshot that a node gives access to stays the same",
            remedy: "open another snapshot-access node")
    }

    public func checkAccess(_ access: Access) throws(BlockError) {
        if access.uses.contains(.resize) {
            throw BlockError(.permissionDenied, "a snapshot cannot be resized")
        }
    }

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        try await source.readSnapshot(offset, into: vector)
    }

    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        source.readSnapshotNow(offset, into: vector)
    }

    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        try await source.snapshotStatus(range, precise: precise, into: answer)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await source.discardSnapshot(range)
    }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        throw Self.readOnly
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        throw Self.readOnly
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        throw Self.readOnly
    }

    public func flush() async throws(BlockError) {
        // Nothing is written here.
    }

    public var filename: String { file.node.driver.filename }

    private static let readOnly = BlockError(.readOnly, "a snapshot cannot be written")
}

extension SnapshotAccess {
    public static let driver = DriverDescription(
        name: "snapshot-access", kind: .access,
        open: { opening throws(BlockError) in try await SnapshotAccess.open(opening) })
}
