import BlockCore
import BlockGraph
import BlockIO

/// `compress`: every write goes on as a compressed one.
///
/// Requests are aligned to the format's clusters above this node, by reading what is around them: what
/// is compressed is whole clusters.
public final class CompressFilter: FilterDriver, @unchecked Sendable {
    private let node: BlockNode
    public let child: Edge
    private let clusterSize: Int

    private init(_ node: BlockNode, _ child: Edge, clusterSize: Int) {
        self.node = node
        self.child = child
        self.clusterSize = clusterSize
        node.size = child.size
        takeLimits()
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> CompressFilter {
        let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
        guard child.node.driver.supportsCompressedWrites else {
            throw BlockError(
                .unsupported,
                "driver '\(child.node.description.name)' does not write compressed data",
                remedy: "put the filter above a format that does, as qcow2")
        }
        let cluster = try await child.node.driver.information.clusterSize
        return CompressFilter(opening.node, child, clusterSize: max(cluster, 1))
    }

    private func takeLimits() {
        var limits = child.node.limits
        limits.requestAlignment = max(limits.requestAlignment, clusterSize)
        node.limits = limits
    }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await child.write(offset, from: vector, flags.union(.compressed))
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await child.writeZeroes(range, flags)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await child.discard(range)
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        try await child.resize(to: size, preallocation)
    }
}

extension CompressFilter {
    public static let driver = DriverDescription(
        name: "compress", kind: .filter,
        open: { opening throws(BlockError) in try await CompressFilter.open(opening) })
}
