import BlockCore
import BlockIO

/// Keeps a copy at so many bytes a second. Confined to its thread.
final class RateLimit: @unchecked Sendable {
    private let thread: IOThread
    private let bytesPerSecond: Int
    /// When all that was let through has been paid for, on the thread's clock.
    private var paidUntil: UInt64

    /// - Returns: `nil` for no limit.
    init?(_ bytesPerSecond: Int, on thread: IOThread) {
        guard bytesPerSecond > 0 else { return nil }
        self.thread = thread
        self.bytesPerSecond = bytesPerSecond
        paidUntil = thread.now
    }

    /// Waits until `count` bytes more may go.
    func admit(_ count: Int) async {
        let now = thread.now
        let start = max(paidUntil, now)
        let seconds = Double(count) / Double(bytesPerSecond)
        let cost = seconds < 1e9 ? UInt64(seconds * 1e9) : 1_000_000_000_000_000_000
        paidUntil = start.adding(cost) ?? .max
        // A tenth of a second ahead is let through: long sleeps for small requests serve nobody.
        guard start > now &+ 100_000_000 else { return }
        await thread.sleep(nanoseconds: start - now)
    }
}
