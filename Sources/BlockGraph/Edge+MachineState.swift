import BlockCore

// Saved state of a virtual machine, which some formats keep beside the disk: bytes at offsets of their own,
// as many as are written.

extension Edge {
    /// Reads saved state of a machine into all of `vector`; zeroes where none was written.
    ///
    /// - Throws: `unsupported` where the image keeps none.
    public func readMachineState(
        _ offset: Int, into vector: IOVector
    ) async throws(BlockError) {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        let node = node
        try checkState(offset, vector.count, of: node, uses: .consistentRead)
        guard vector.count > 0 else { return }
        if let child = node.stateChild {
            return try await child.readMachineState(offset, into: vector)
        }
        do throws(BlockError) {
            try await node.driver.readMachineState(offset, into: vector)
        } catch {
            throw error.on(node: node.name)
        }
    }

    /// Writes saved state of a machine. The disk stays as it is.
    ///
    /// - Throws: `unsupported` where the image keeps none, `readOnly`.
    public func writeMachineState(
        _ offset: Int, from vector: IOVector
    ) async throws(BlockError) {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        let node = node
        if node.isReadOnly { throw BlockError(.readOnly, "the node is read-only", node: node.name) }
        try checkState(offset, vector.count, of: node, uses: .write)
        guard vector.count > 0 else { return }
        if let child = node.stateChild {
            return try await child.writeMachineState(offset, from: vector)
        }
        try await node.willChange()
        // Tables may have to grow for it, which no write may meet.
        let request = try await node.begin(
            ByteRange(0, node.size), serialising: true, end: 0)
        defer { node.tracker.leave(request) }
        do throws(BlockError) {
            try await node.driver.writeMachineState(offset, from: vector)
        } catch {
            throw error.on(node: node.name)
        }
    }

    /// - Throws: for what is out of bounds, not aligned or not allowed.
    private func checkState(
        _ offset: Int, _ count: Int, of node: BlockNode, uses: Permission
    ) throws(BlockError) {
        guard offset >= 0, count <= Limits.requestBytesMax, offset.adding(count) != nil else {
            throw BlockError(
                .outOfRange, "\(count) bytes at \(offset) are out of bounds", node: node.name)
        }
        let unit = node.limits.requestAlignment
        guard offset.isAligned(to: unit), count.isAligned(to: unit) else {
            throw BlockError(
                .invalidArgument, "saved state is read and written in units of \(unit) bytes",
                node: node.name)
        }
        guard access.uses.isSuperset(of: uses) else {
            throw BlockError(
                .permissionDenied,
                "\(parentDescription) has no \(uses.names.joined(separator: ", ")) permission",
                node: node.name)
        }
    }
}

extension BlockNode {
    /// Whose state a filter's is.
    fileprivate var stateChild: Edge? {
        description.kind == .filter ? filteredChild : nil
    }
}
