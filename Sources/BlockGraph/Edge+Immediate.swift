import BlockCore

// Requests that need not wait: what the page cache and the tables in memory can serve at once.
//
// They pass the same checks as the others, in `Edge+Requests.swift`, and count in the same statistics.
// Whatever would make one wait, or is not plain, is left to the others: a closed gate, an unaligned
// request, a serialising write, a flag, an error. So a caller tries this first and then the
// other, and saves a task where the first succeeds: most of what a request costs beside its copies.

extension Edge {
    /// ``read(_:into:_:)`` without waiting.
    ///
    /// - Returns: `false` where it cannot be done now: call `read`.
    @inline(__always)
    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        let node = node
        guard gateCount == 0, vector.count > 0, vector.count < Limits.immediateBytesMax,
            isWithin(node, offset, vector.count), access.uses.contains(.consistentRead),
            node.isPlain(offset, vector)
        else { return false }
        if !isRoot { return node.driver.readNow(offset, into: vector) }
        let start = node.thread.now
        guard node.driver.readNow(offset, into: vector) else { return false }
        trace("read", offset, vector.count)
        statistics.note(.read, bytes: vector.count, since: start, now: node.thread.now)
        return true
    }

    /// ``write(_:from:_:)`` without waiting and without flags.
    ///
    /// - Returns: `false` where it cannot be done now; a part may be written: call `write`.
    @inline(__always)
    public func writeNow(_ offset: Int, from vector: IOVector) -> Bool {
        let node = node
        guard gateCount == 0, vector.count > 0, isWithin(node, offset, vector.count),
            access.uses.contains(.write), !node.isReadOnly, !isWriteThrough,
            node.isPlain(offset, vector), node.options.zeroDetection == .off,
            node.tracker.allowsImmediateWrites, !node.awaitsFirstChange
        else { return false }
        if !isRoot { return node.writtenNow(offset, vector) }
        let start = node.thread.now
        guard node.writtenNow(offset, vector) else { return false }
        trace("write", offset, vector.count)
        statistics.note(.write, bytes: vector.count, since: start, now: node.thread.now)
        return true
    }

    @inline(__always)
    private func isWithin(_ node: BlockNode, _ offset: Int, _ count: Int) -> Bool {
        offset >= 0 && count <= node.size && offset <= node.size &- count
    }
}

extension BlockNode {
    /// Whether the driver takes it as it is: aligned, and not too long.
    @inline(__always)
    fileprivate func isPlain(_ offset: Int, _ vector: IOVector) -> Bool {
        (offset | vector.count).isAligned(to: limits.requestAlignment)
            && vector.count <= limits.transferMax && vector.isAligned(to: limits.memoryAlignment)
    }

    @inline(__always)
    fileprivate func writtenNow(_ offset: Int, _ vector: IOVector) -> Bool {
        guard driver.writeNow(offset, from: vector) else { return false }
        written(ByteRange(offset, vector.count))
        return true
    }
}
