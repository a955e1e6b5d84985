/// Tasks that wait until something happens, and are woken together.
///
/// Confined to the thread of those who wait and wake, as the objects are that have one.
///
/// Invariants:
/// 1. ``wakeAll()`` resumes each task that waits, once, in the order in which they came. One that waits again,
///    or comes later, is there for the next time.
/// 2. A waking that meets nobody leaves no trace. So there is no `await` between looking at what is waited for
///    and ``wait()``; and as others are resumed first, who was woken looks again.
package final class WaitQueue {
    @usableFromInline
    var sleepers: [UnsafeContinuation<Void, Never>] = []

    package init() {}

    /// Returns after the next ``wakeAll()``.
    package func wait() async {
        await withUnsafeContinuation { sleepers.append($0) }
    }

    @inlinable
    package func wakeAll() {
        if sleepers.isEmpty { return }
        let woken = sleepers
        sleepers = []
        for sleeper in woken { sleeper.resume() }
    }
}
