import BlockCore

// Copying without reading: the storage below moves the bytes by itself.
//
// The way of a copy: the source is asked where its storage holds the bytes (`locate`, down to a storage
// node); the target then takes that place down to its own storage, which does the work or refuses.
// A driver forwards either only where its bytes are the child's bytes at another offset.

/// Bytes as a storage node holds them.
public struct StoredRange: Sendable {
    /// A node of a storage driver.
    public let node: BlockNode
    public let range: ByteRange

    public init(_ node: BlockNode, _ range: ByteRange) {
        self.node = node
        self.range = range
    }
}

/// What a copy within the storage may do.
public enum CopyMethod: Sendable {
    /// The two files share their blocks afterwards (reflink): no data moves.
    case share
    /// The system copies (`copy_file_range`), sharing where it can.
    case copy
}

extension Edge {
    /// Copies bytes of `source` to `offset` here without reading them into memory.
    ///
    /// - Throws: `unsupported` where the storage of the two cannot do that: read and write then. Any
    ///   other error is one of the copy; the range has undefined content afterwards.
    public func copyRange(
        from source: Edge, _ range: ByteRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError) {
        try await source.whileReading(range) { stored throws(BlockError) in
            try await self.copyRange(from: stored, to: offset, method)
        }
    }

    /// Where the storage below holds `range`; what a driver forwards ``BlockDriver/locate(_:)`` by.
    ///
    /// - Throws: `unsupported` where there is no such place.
    public func locate(_ range: ByteRange) throws(BlockError) -> StoredRange {
        let node = node
        try check(range.offset, range.count, of: node, uses: .consistentRead)
        return try node.driver.locate(range)
    }

    /// What a driver forwards ``BlockDriver/copyRange(from:to:_:)`` by.
    public func copyRange(
        from stored: StoredRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError) {
        try await counted(.write, stored.range.count) { node throws(BlockError) in
            try checkWrite(offset, stored.range.count, of: node, [])
            if stored.range.isEmpty { return }
            try await node.trackedCopy(from: stored, to: offset, method)
            if isWriteThrough { try await node.stickyFlush() }
        }
    }

    /// Counts a reader in while `body` uses the place of its bytes.
    private func whileReading(
        _ range: ByteRange, _ body: (StoredRange) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        try await counted(.read, range.count) { _ throws(BlockError) in
            try await body(try locate(range))
        }
    }
}

extension BlockNode {
    func trackedCopy(
        from stored: StoredRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError) {
        let range = ByteRange(offset, stored.range.count)
        guard range.isAligned(to: limits.requestAlignment),
            stored.range.offset.isAligned(to: limits.requestAlignment)
        else {
            throw BlockError(.unsupported, "only whole blocks are copied by the storage")
        }
        try await willChange()
        let request = try await begin(range, serialising: false, end: range.end)
        defer { tracker.leave(request) }
        do throws(BlockError) {
            try await driver.copyRange(from: stored, to: offset, method)
        } catch {
            failed(range)
            throw error
        }
        written(range)
    }
}
