import BlockCore
import BlockIO

/// Ranges that are held for a while: shared by many, or exclusive to one. Confined to its thread.
///
/// Few are held at once, so a list serves. Not fair: who waits looks again when something is let go.
public final class RangeLocks {
    private var held: [(range: Range<Int>, isExclusive: Bool)] = []
    private let changes = WaitQueue()

    public init() {}

    public var isEmpty: Bool { held.isEmpty }

    /// Whether a holder stands in the way.
    @inline(__always)
    public func conflicts(_ range: Range<Int>, exclusively: Bool) -> Bool {
        if held.isEmpty { return false }
        return held.contains { ($0.isExclusive || exclusively) && $0.range.overlaps(range) }
    }

    /// Takes a range that nobody stands in the way of.
    @inline(__always)
    public func take(_ range: Range<Int>, exclusively: Bool) {
        held.append((range, exclusively))
    }

    /// Waits until nobody stands in the way, and takes the range.
    public func lock(_ range: Range<Int>, exclusively: Bool) async {
        await waitUntilFree(range, exclusively: exclusively)
        take(range, exclusively: exclusively)
    }

    /// Waits until nobody stands in the way.
    public func waitUntilFree(_ range: Range<Int>, exclusively: Bool) async {
        while conflicts(range, exclusively: exclusively) {
            await untilChange()
        }
    }

    /// Waits until something is let go, or ``wake()``: for who then looks at more than the locks.
    public func untilChange() async {
        await changes.wait()
    }

    /// Lets all who wait look again.
    public func wake() {
        changes.wakeAll()
    }

    /// Lets go of a range that was taken.
    public func unlock(_ range: Range<Int>, exclusively: Bool) {
        let index = held.lastIndex { $0.range == range && $0.isExclusive == exclusively }
        guard let index else { preconditionFailure("a range was not held") }
        held.swapAt(index, held.count - 1)
        held.removeLast()
        wake()
    }
}
