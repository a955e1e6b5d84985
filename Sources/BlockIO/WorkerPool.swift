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

    private struct State {
        var queue: [@Sendable () -> Void] = []
        var head = 0
        var threadCount = 0
        var idleCount = 0
    }

    private let threadCountMax: Int
    private let monitor = Monitor<State>(State())

    public init(threadCountMax: Int) {
        self.threadCountMax = threadCountMax
    }

    /// Runs `work` on a worker thread, after what was submitted before began.
    public func submit(_ work: @escaping @Sendable () -> Void) {
        let needsThread = monitor.withLock { state in
            state.queue.append(work)
            let waiting = state.queue.count - state.head
            guard waiting > state.idleCount, state.threadCount < threadCountMax else {
                return false
            }
            state.threadCount += 1
            return true
        }
        guard needsThread else {
            monitor.signal()
            return
        }
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
        while true {
            var isIdle = false
            let work: (@Sendable () -> Void)? = monitor.wait(seconds: 5) { state in
                if let work = Self.next(&state) {
                    if isIdle { state.idleCount -= 1 }
                    return work
                }
                if !isIdle { state.idleCount += 1 }
                isIdle = true
                return nil
            }
            guard let work else { break }
            work()
        }
        // Something may have come between the wait's end and here: it is not to be left behind.
        let last: (@Sendable () -> Void)? = monitor.withLock { state in
            state.idleCount -= 1
            let work = Self.next(&state)
            if work == nil { state.threadCount -= 1 }
            return work
        }
        guard let last else { return }
        last()
        self.work()
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
