import BlockCore
import BlockIO

// The one checked way of a request into a node.
//
// Each request method: waits at the gate (users' edges), checks range and permission, cuts what is
// too long, aligns what is not aligned, keeps serialising writes apart, calls the driver, and counts.
// The common case — aligned, short enough, nobody serialising — goes straight through.

extension Edge {
    // MARK: Read

    /// Reads the bytes at `offset` into all of `vector`.
    ///
    /// - Throws: `outOfRange` past the end of the node, and what the driver throws.
    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags = []
    ) async throws(BlockError) {
        trace("read", offset, vector.count)
        guard isRoot else {
            let node = node
            try check(offset, vector.count, of: node, uses: .consistentRead)
            if vector.count > 0 { try await node.alignedRead(offset, into: vector, flags) }
            return
        }
        await enter()
        // Behind the gate: another node may have taken the place of the one before.
        let node = node
        let start = node.thread.now
        do throws(BlockError) {
            try check(offset, vector.count, of: node, uses: .consistentRead)
            if vector.count > 0 { try await node.alignedRead(offset, into: vector, flags) }
        } catch {
            failed(.read, error)
            throw error.on(node: node.name)
        }
        finish(.read, vector.count, since: start)
    }

    // MARK: Write

    /// Writes all of `vector` at `offset`.
    ///
    /// - Throws: `outOfRange` past the end, `readOnly`, and what the driver throws.
    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags = []
    ) async throws(BlockError) {
        trace("write", offset, vector.count)
        guard isRoot else {
            let node = node
            try checkWrite(offset, vector.count, of: node, flags)
            if vector.count > 0 { try await node.trackedWrite(offset, from: vector, flags) }
            return
        }
        await enter()
        let node = node
        let start = node.thread.now
        do throws(BlockError) {
            try checkWrite(offset, vector.count, of: node, flags)
            if vector.count > 0 {
                let flags = isWriteThrough ? flags.union(.fua) : flags
                try await node.trackedWrite(offset, from: vector, flags)
            }
        } catch {
            failed(.write, error)
            throw error.on(node: node.name)
        }
        finish(.write, vector.count, since: start)
    }

    /// Makes `range` read as zeroes.
    ///
    /// - Throws: `unsupported` with `noFallback` where that is no faster than writing.
    public func writeZeroes(
        _ range: ByteRange, _ flags: WriteFlags = []
    ) async throws(BlockError) {
        trace("write_zeroes", range.offset, range.count)
        let flags = isWriteThrough ? flags.union(.fua) : flags
        try await counted(.writeZeroes, range.count) { node throws(BlockError) in
            try checkWrite(range.offset, range.count, of: node, flags)
            if !range.isEmpty { try await node.trackedZeroes(range, flags) }
        }
    }

    /// Says that `range` is not needed any more. A hint: what cannot be given back stays.
    public func discard(_ range: ByteRange) async throws(BlockError) {
        trace("discard", range.offset, range.count)
        try await counted(.discard, range.count) { node throws(BlockError) in
            try checkWrite(range.offset, range.count, of: node, [])
            // The user decided for the node that its discards go no further.
            if range.isEmpty || !node.options.discards { return }
            try await node.trackedDiscard(range)
        }
    }

    /// Everything written before is on stable storage on return.
    ///
    /// - Throws: also when an earlier flush of the node failed.
    public func flush() async throws(BlockError) {
        trace("flush", 0, 0)
        try await counted(.flush, 0) { node throws(BlockError) in
            try await node.stickyFlush()
        }
    }

    // MARK: Status

    /// What the node alone knows of the bytes from `range.offset` on: what layers below it have is
    /// ``chainStatus(_:precise:into:)``'s to say.
    ///
    /// - Parameters:
    ///   - precise: ask storage about zeroes too.
    ///   - answer: what was in it goes. It gets at least one run; all of `range` need not be covered, be
    ///     it for want of room or because an error comes next: ask again from there.
    public func blockStatus(
        _ range: ByteRange, precise: Bool = true, into answer: BlockStatusList
    ) async throws(BlockError) {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        answer.removeAll()
        let node = node
        try check(range.offset, range.count, of: node, uses: [])
        guard !range.isEmpty else {
            throw BlockError(.invalidArgument, "block status of nothing", node: node.name)
        }
        try await node.status(range, precise: precise, into: answer)
    }

    /// The first run of ``blockStatus(_:precise:into:)``, at most all of `range`.
    public func blockStatus(
        _ range: ByteRange, precise: Bool = true
    ) async throws(BlockError) -> BlockStatus {
        let answer = BlockStatusList(limit: 1)
        try await blockStatus(range, precise: precise, into: answer)
        return answer.runs[0]
    }

    /// What a driver answers whose bytes are those of this child from `range.offset` on: what the child
    /// answers, and zeroes past its end.
    ///
    /// - Parameter answer: empty.
    public func forwardStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        guard range.offset < size else {
            answer.append(BlockStatus([.zero, .allocated], count: range.count))
            return
        }
        let there = ByteRange(range.offset, min(range.count, size - range.offset))
        try await blockStatus(there, precise: precise, into: answer)
    }

    // MARK: Resize

    /// Changes the size of the node; bytes that appear read as zeroes.
    public func resize(
        to size: Int, _ preallocation: Preallocation = .off
    ) async throws(BlockError) {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        let node = node
        guard size >= 0, size <= Limits.nodeSizeMax else {
            throw BlockError(
                .invalidArgument, "a size of \(size) bytes is out of bounds", node: node.name)
        }
        guard access.uses.contains(.resize) else {
            throw BlockError(
                .permissionDenied, "\(parentDescription) may not resize it", node: node.name)
        }
        if node.isReadOnly { throw BlockError(.readOnly, "the node is read-only", node: node.name) }
        try await node.willChange()
        let whole = ByteRange(0, max(size, node.size))
        let request = try await node.begin(whole, serialising: true, end: 0)
        defer { node.tracker.leave(request) }
        do throws(BlockError) {
            node.changedSinceFlush = true
            try await node.driver.resize(to: size, preallocation)
        } catch {
            throw error.on(node: node.name)
        }
    }

    // MARK: Snapshot access

    /// The snapshot that the node behind the edge gives access to.
    ///
    /// - Throws: `unsupported` where it gives none.
    public func snapshotSource() throws(BlockError) -> any SnapshotSource {
        guard let source = node.driver.snapshotSource else {
            throw BlockError(
                .unsupported,
                "driver '\(node.description.name)' gives no access to snapshots",
                remedy: "use a copy-before-write node", node: node.name)
        }
        return source
    }

    // MARK: Checks and counts

    @inline(__always)
    func trace(_ kind: StaticString, _ offset: Int, _ count: Int) {
        TracePoint.edgeRequest(
            "kind \(kind) node \(node.name) offset \(offset) bytes \(count) by \(parentDescription)"
        )
    }

    @inline(__always)
    func check(
        _ offset: Int, _ count: Int, of node: BlockNode, uses: Permission
    ) throws(BlockError) {
        guard offset >= 0, count >= 0, count <= node.size, offset <= node.size &- count else {
            throw Self.outOfRange(offset, count, node)
        }
        guard access.uses.isSuperset(of: uses) else { throw denied(uses) }
    }

    @inline(__always)
    func checkWrite(
        _ offset: Int, _ count: Int, of node: BlockNode, _ flags: WriteFlags
    ) throws(BlockError) {
        let uses: Permission = flags.contains(.unchanged) ? .writeUnchanged : .write
        guard offset >= 0, count >= 0, count <= node.size, offset <= node.size &- count else {
            throw Self.outOfRange(offset, count, node)
        }
        if node.isReadOnly { throw BlockError(.readOnly, "the node is read-only", node: node.name) }
        guard !access.uses.isDisjoint(with: [uses, .write]) else { throw denied(uses) }
    }

    private static func outOfRange(_ offset: Int, _ count: Int, _ node: BlockNode) -> BlockError {
        BlockError(
            .outOfRange, "\(count) bytes at \(offset) reach past its end at \(node.size)",
            node: node.name)
    }

    private func denied(_ permission: Permission) -> BlockError {
        BlockError(
            .permissionDenied,
            "\(parentDescription) has no \(permission.names.joined(separator: ", ")) permission",
            node: node.name)
    }

    func counted(
        _ kind: RequestKind, _ bytes: Int,
        _ body: (BlockNode) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        guard isRoot else {
            try await body(node)
            return
        }
        await enter()
        let node = node
        let start = node.thread.now
        do throws(BlockError) {
            try await body(node)
        } catch {
            failed(kind, error)
            throw error.on(node: node.name)
        }
        finish(kind, bytes, since: start)
    }

    @inline(__always)
    private func finish(_ kind: RequestKind, _ bytes: Int, since start: UInt64) {
        statistics.note(kind, bytes: bytes, since: start, now: node.thread.now)
        leave()
    }

    private func failed(_ kind: RequestKind, _ error: BlockError) {
        statistics.noteFailure(kind, error.code, now: node.thread.now)
        leave()
    }
}
