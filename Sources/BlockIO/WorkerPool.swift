import BlockCore
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Threads for what would stall an ``IOThread``: blocking system calls, compression, encryption.
///
/// Threads start when there is work and none is idle, up to a limit, and end after a while of
/// idleness, so that an idle daemon has none.
public final class WorkerPool: Sendable {
    /// The pool of the process.
    public static let shared = WorkerPool(threadCountMax: 64)
    /// No pool has more threads, whatever it is told.
    public static let threadCountLimit = 1024

    private struct State {
        var queue: [@Sendable () -> Void] = []
        var head = 0
        var threadCount = 0
        var idleCount = 0
        /// Threads that do not end in idleness.
        var threadCountMin = 0
        var threadCountMax: Int
    }

    private enum Step {
        case work(@Sendable () -> Void)
        case leave
    }

    private let monitor: Monitor<State>

    public init(threadCountMax: Int) {
        monitor = Monitor(State(threadCountMax: threadCountMax))
    }

    /// Threads that there are.
    public var threadCount: Int { monitor.withLock { $0.threadCount } }

    /// Has at least `least` threads, at once and also when there is nothing to do, and at most `most`, 1 or
    /// more: those beyond end when they have done what they are doing.
    public func setThreadCounts(least: Int, most: Int) {
        let missing = monitor.withLock { state in
            state.threadCountMax = min(max(most, 1), Self.threadCountLimit)
            state.threadCountMin = min(max(least, 0), state.threadCountMax)
            // What waits may begin now.
            let waiting = state.queue.count - state.head
            let wanted = state.threadCount + max(0, waiting - state.idleCount)
            let missing =
                min(max(wanted, state.threadCountMin), state.threadCountMax) - state.threadCount
            guard missing > 0 else { return 0 }
            state.threadCount += missing
            return missing
        }
        for _ in 0..<missing { startThread() }
        monitor.signal()
    }

    /// Runs `work` on a worker thread, after what was submitted before began.
    public func submit(_ work: @escaping @Sendable () -> Void) {
        let needsThread = monitor.withLock { state in
            state.queue.append(work)
            let waiting = state.queue.count - state.head
            guard waiting > state.idleCount, state.threadCount < state.threadCountMax else {
                return false
            }
            state.threadCount += 1
            return true
        }
        if needsThread { startThread() } else { monitor.signal() }
    }

    /// Starts one that is counted already.
    private func startThread() {
        do throws(BlockError) {
            try ThreadBody { self.work() }.start(name: "merino-worker")
        } catch {
            let alone = monitor.withLock { state in
                state.threadCount -= 1
                return state.threadCount == 0
            }
            // With no thread to be had, slow beats never.
            if alone { drainHere() } else { monitor.signal() }
        }
    }

    private func drainHere() {
        while let work = monitor.withLock({ Self.next(&$0) }) { work() }
    }

    private func work() {
        while let work = nextWork() { work() }
        // It may have been woken for something that another one is to do.
        if monitor.withLock({ $0.head < $0.queue.count }) { monitor.signal() }
    }

    /// - Returns: `nil` when the thread is to end; it does not count any more then.
    private func nextWork() -> (@Sendable () -> Void)? {
        while true {
            var isIdle = false
            let step: Step? = monitor.wait(seconds: 5) { state in
                if let step = Self.step(&state, ends: false) {
                    if isIdle { state.idleCount -= 1 }
                    return step
                }
                if !isIdle { state.idleCount += 1 }
                isIdle = true
                return nil
            }
            // Something may have come between the wait's end and here: it is not to be left behind.
            let settled =
                step
                ?? monitor.withLock { state in
                    state.idleCount -= 1
                    return Self.step(&state, ends: true)
                }
            switch settled {
            case .work(let work): return work
            case .leave: return nil
            case nil: continue
            }
        }
    }

    /// What a thread does next; `nil` to wait.
    ///
    /// - Parameter ends: it has waited for long enough.
    private static func step(_ state: inout State, ends: Bool) -> Step? {
        if state.threadCount > state.threadCountMax {
            state.threadCount -= 1
            return .leave
        }
        if let work = next(&state) { return .work(work) }
        guard ends, state.threadCount > state.threadCountMin else { return nil }
        state.threadCount -= 1
        return .leave
    }

    private static func next(_ state: inout State) -> (@Sendable () -> Void)? {
        guard state.head < state.queue.count else { return nil }
        let work = state.queue[state.head]
        state.head += 1
        if state.head == state.queue.count {
            state.queue.removeAll(keepingCapacity: true)
            state.head = 0
        } else if state.head > 1024 {
            state.queue.removeSubrange(0..<state.head)
            state.head = 0
        }
        return work
    }
}
