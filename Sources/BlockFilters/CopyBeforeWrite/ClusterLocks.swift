import BlockCore

/// Runs of clusters that are held for a while: shared by readers, exclusive to a copy.
///
/// Few are held at once, so a list serves. Confined to the graph's thread.
final class ClusterLocks {
    private var held: [(clusters: Range<Int>, isExclusive: Bool)] = []
    private var sleepers: [UnsafeContinuation<Void, Never>] = []

    var isEmpty: Bool { held.isEmpty }

    /// Whether a copy holds any of `clusters`.
    func isHeldExclusively(_ clusters: Range<Int>) -> Bool {
        held.contains { $0.isExclusive && $0.clusters.overlaps(clusters) }
    }

    func lock(_ clusters: Range<Int>, exclusively: Bool) {
        held.append((clusters, exclusively))
    }

    func unlock(_ clusters: Range<Int>, exclusively: Bool) {
        let index = held.firstIndex { $0.clusters == clusters && $0.isExclusive == exclusively }
        guard let index else { preconditionFailure("a cluster lock was not held") }
        held.swapAt(index, held.count - 1)
        held.removeLast()
        let woken = sleepers
        sleepers = []
        for continuation in woken { continuation.resume() }
    }

    /// Returns when none of `clusters` is held (by a copy, with `exclusiveOnly`).
    func waitUntilFree(_ clusters: Range<Int>, exclusiveOnly: Bool = false) async {
        while held.contains(where: {
            $0.clusters.overlaps(clusters) && ($0.isExclusive || !exclusiveOnly)
        }) {
            await withUnsafeContinuation { sleepers.append($0) }
        }
    }
}
