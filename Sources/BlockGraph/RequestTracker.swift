import BlockCore

/// The writes in flight on one node, to keep overlapping ones apart where that matters.
///
/// Invariants:
/// 1. A serialising request runs only while no tracked request overlaps it.
/// 2. No request begins while a serialising request, running or waiting before it, overlaps it.
struct RequestTracker {
    private struct Entry {
        let identifier: UInt64
        let range: ByteRange
        let isSerialising: Bool
        /// Waiting for requests before it.
        var isWaiting: Bool
    }

    private var entries: [Entry] = []
    private var serialisingCount = 0
    private var lastIdentifier: UInt64 = 0
    private var sleepers: [UnsafeContinuation<Void, Never>] = []

    /// Enters a request.
    /// - Returns: its identifier, and whether it must wait: see `mustWait`.
    mutating func enter(_ range: ByteRange, serialising: Bool) -> (identifier: UInt64, waits: Bool)
    {
        lastIdentifier += 1
        let waits =
            (serialising || serialisingCount > 0) && conflicts(range, serialising, before: nil)
        entries.append(
            Entry(
                identifier: lastIdentifier, range: range, isSerialising: serialising,
                isWaiting: waits))
        if serialising { serialisingCount += 1 }
        return (lastIdentifier, waits)
    }

    /// A write that is over before anything else happens needs no entry, as long as nobody serialises.
    var allowsImmediateWrites: Bool { serialisingCount == 0 }

    /// Whether the request that entered as `identifier` still has to wait.
    mutating func mustWait(_ identifier: UInt64) -> Bool {
        guard let index = entries.firstIndex(where: { $0.identifier == identifier }) else {
            return false
        }
        let entry = entries[index]
        let waits = conflicts(entry.range, entry.isSerialising, before: identifier)
        entries[index].isWaiting = waits
        return waits
    }

    mutating func sleep(_ continuation: UnsafeContinuation<Void, Never>) {
        sleepers.append(continuation)
    }

    mutating func leave(_ identifier: UInt64) {
        guard let index = entries.lastIndex(where: { $0.identifier == identifier }) else { return }
        if entries[index].isSerialising { serialisingCount -= 1 }
        // Order matters to waiting requests only.
        if sleepers.isEmpty {
            entries.swapAt(index, entries.count - 1)
            entries.removeLast()
            return
        }
        entries.remove(at: index)
        let woken = sleepers
        sleepers.removeAll()
        for continuation in woken { continuation.resume() }
    }

    /// Identifiers grow, so "before" is a smaller one.
    private func conflicts(_ range: ByteRange, _ serialising: Bool, before: UInt64?) -> Bool {
        entries.contains { entry in
            if let before,
                entry.identifier == before || entry.isWaiting && entry.identifier > before
            {
                return false
            }
            return (serialising || entry.isSerialising) && entry.range.overlaps(range)
        }
    }
}
