import BlockCore

// Block status of the whole chain: what a reader of the node gets, and how deep it comes from.
//
// Each layer is asked for many runs at a time; what it does not have, run by run, the layer below is
// asked for. `answer` has the runs of the chain, in order; each layer uses a list of its own, which hangs
// on the one above.

extension Edge {
    /// What is known of the bytes from `range.offset` on, over all layers below the edge.
    ///
    /// - Parameters:
    ///   - precise: ask storage about zeroes too.
    ///   - answer: what was in it goes. It gets at least one run; all of `range` need not be covered, be
    ///     it for want of room or because an error comes next: ask again from there.
    public func chainStatus(
        _ range: ByteRange, precise: Bool = true, into answer: BlockStatusList
    ) async throws(BlockError) {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        answer.removeAll()
        let node = node
        guard !range.isEmpty, range.end <= node.size else {
            throw BlockError(
                .outOfRange, "block status of \(range) is past its end at \(node.size)",
                node: node.name)
        }
        try await node.chainStatus(
            range, precise: precise, depth: 0, into: answer, by: answer.below)
        if range.offset + answer.byteCount == node.size { answer.markEnd() }
    }

    /// The first run of ``chainStatus(_:precise:into:)``, at most all of `range`.
    public func chainStatus(
        _ range: ByteRange, precise: Bool = true
    ) async throws(BlockError) -> BlockStatus {
        let answer = BlockStatusList(limit: 1)
        try await chainStatus(range, precise: precise, into: answer)
        return answer.runs[0]
    }
}

extension BlockNode {
    /// Adds what the layers from here down say of `range`, as much as there is room for.
    ///
    /// - Parameters:
    ///   - depth: of this layer.
    ///   - own: for what this layer alone says.
    /// - Throws: when it was `answer`'s first run that could not be had.
    fileprivate func chainStatus(
        _ range: ByteRange, precise: Bool, depth: Int, into answer: BlockStatusList,
        by own: BlockStatusList
    ) async throws(BlockError) {
        let layer = withoutFilters
        guard range.offset < layer.size else {
            // Above, the layer is longer: there it reads as zeroes.
            answer.append(BlockStatus(.zero, count: range.count, depth: depth))
            return
        }
        let there = ByteRange(range.offset, min(range.count, layer.size - range.offset))
        own.removeAll()
        do throws(BlockError) {
            try await layer.status(there, precise: precise, into: own)
        } catch {
            if answer.isEmpty { throw error }
            return
        }
        var offset = range.offset
        for index in own.runs.indices {
            var run = own.runs[index]
            run.flags.remove(.endOfNode)
            if !run.flags.isDisjoint(with: [.data, .zero, .allocated]) {
                run.depth = depth
                guard answer.append(run) else { return }
            } else if let backing = layer.backing {
                if answer.isFull { return }
                let before = answer.byteCount
                try await backing.node.chainStatus(
                    ByteRange(offset, run.count), precise: precise, depth: depth + 1, into: answer,
                    by: own.below)
                guard answer.byteCount - before == run.count else { return }
            } else {
                let nothing = BlockStatus(.zero, count: run.count, depth: nil)
                guard answer.append(nothing) else { return }
            }
            offset += run.count
        }
        if offset == layer.size, offset < range.end {
            answer.append(BlockStatus(.zero, count: range.end - offset, depth: depth))
        }
    }

    /// Whether the node, or what its filters stand above, shows data of a backing image.
    public var hasLayersBelow: Bool { withoutFilters.backing != nil }

    /// Filters are no layers.
    private var withoutFilters: BlockNode {
        var node = self
        while node.description.kind == .filter, let child = node.filteredChild {
            node = child.node
        }
        return node
    }
}
