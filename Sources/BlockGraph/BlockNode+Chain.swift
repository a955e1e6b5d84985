import BlockCore

/// Block status of the whole chain: what a reader of the node gets, and how deep it comes from.
public struct ChainStatus: Sendable {
    public var flags: ExtentFlags
    public var count: Int
    /// 0: the top layer has it; 1: its backing; … `nil` when no layer has it: zeroes.
    public var depth: Int?
    public var mapping: BlockStatus.Mapping?
}

extension Edge {
    /// What is known of the bytes from `range.offset` on, over all layers below the edge.
    ///
    /// - Returns: a run of at least 1 and at most `range.count` bytes.
    public func chainStatus(
        _ range: ByteRange, precise: Bool = true
    ) async throws(BlockError) -> ChainStatus {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        let node = node
        guard !range.isEmpty, range.end <= node.size else {
            throw BlockError(
                .outOfRange, "block status of \(range) is past its end at \(node.size)",
                node: node.name)
        }
        return try await node.chainStatus(range, precise: precise)
    }
}

extension BlockNode {
    func chainStatus(_ range: ByteRange, precise: Bool) async throws(BlockError) -> ChainStatus {
        var node = self
        var depth = 0
        var count = range.count
        while true {
            // Filters are no layers.
            while node.description.kind == .filter, let child = node.filteredChild {
                node = child.node
            }
            guard range.offset < node.size else {
                // Above, the layer is longer: there it reads as zeroes.
                return ChainStatus(flags: .zero, count: count, depth: depth, mapping: nil)
            }
            let asked = ByteRange(range.offset, min(count, node.size - range.offset))
            let status = try await node.status(asked, precise: precise)
            count = status.count
            if !status.flags.isDisjoint(with: [.data, .zero, .allocated]) {
                return ChainStatus(
                    flags: status.flags, count: count, depth: depth, mapping: status.mapping)
            }
            guard let backing = node.backing else {
                return ChainStatus(flags: .zero, count: count, depth: nil, mapping: nil)
            }
            node = backing.node
            depth += 1
        }
    }
}
