import BlockCore

/// The sleepers of one ``IOThread``, soonest last.
struct TimerQueue {
    enum Outcome {
        case passed, cancelled
        /// The thread ends: whoever sleeps here goes on elsewhere.
        case evicted
    }

    struct Entry {
        let deadline: UInt64
        let identifier: UInt64
        let continuation: UnsafeContinuation<Outcome, Never>
    }
    private var entries: [Entry] = []
    private var lastIdentifier: UInt64 = 0

    var isEmpty: Bool { entries.isEmpty }
    var nextDeadline: UInt64? { entries.last?.deadline }

    mutating func nextIdentifier() -> UInt64 {
        lastIdentifier += 1
        return lastIdentifier
    }

    mutating func insert(_ entry: Entry) {
        // Equal deadlines fire in the order they were set.
        let index = entries.firstIndex { $0.deadline <= entry.deadline } ?? entries.endIndex
        entries.insert(entry, at: index)
    }

    mutating func cancel(_ identifier: UInt64) {
        guard let index = entries.firstIndex(where: { $0.identifier == identifier }) else { return }
        entries.remove(at: index).continuation.resume(returning: .cancelled)
    }

    mutating func fire(now: UInt64) {
        while let entry = entries.last, entry.deadline <= now {
            entries.removeLast()
            entry.continuation.resume(returning: .passed)
        }
    }

    mutating func evict() {
        while let entry = entries.popLast() { entry.continuation.resume(returning: .evicted) }
    }
}

/// A deadline that can be called off. Confined to where its seat stands.
public final class IOTimer: @unchecked Sendable {
    private let seat: IOSeat
    /// On whose queue it waits: its seat may have moved on since.
    private var waiting: (thread: IOThread, identifier: UInt64)?
    private var isCancelled = false

    public init(on seat: IOSeat) {
        self.seat = seat
    }

    /// On a thread for good.
    public convenience init(on thread: IOThread) {
        self.init(on: IOSeat(on: thread))
    }

    /// Waits until the deadline passes or ``cancel()`` is called. One wait per timer.
    ///
    /// - Returns: `true` when the deadline passed.
    public func wait(nanoseconds: UInt64) async -> Bool {
        let deadline = seat.thread.now.adding(nanoseconds) ?? .max
        while !isCancelled {
            let thread = seat.thread
            let outcome = await withUnsafeContinuation { continuation in
                let identifier = thread.timers.nextIdentifier()
                waiting = (thread, identifier)
                thread.timers.insert(
                    .init(deadline: deadline, identifier: identifier, continuation: continuation))
            }
            waiting = nil
            if outcome != .evicted { return outcome == .passed }
        }
        return false
    }

    public func cancel() {
        isCancelled = true
        guard let (thread, identifier) = waiting else { return }
        if thread.isCurrent {
            thread.timers.cancel(identifier)
        } else {
            thread.spawn { thread.timers.cancel(identifier) }
        }
    }
}

extension IOThread {
    /// Suspends the calling task. On the thread only.
    public func sleep(nanoseconds: UInt64) async {
        _ = await IOTimer(on: self).wait(nanoseconds: nanoseconds)
    }
}
