import BlockCore

/// The sleepers of one ``IOThread``, soonest last.
struct TimerQueue {
    struct Entry {
        let deadline: UInt64
        let identifier: UInt64
        /// `true`: the deadline passed; `false`: cancelled.
        let continuation: UnsafeContinuation<Bool, Never>
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
        entries.remove(at: index).continuation.resume(returning: false)
    }

    mutating func fire(now: UInt64) {
        while let entry = entries.last, entry.deadline <= now {
            entries.removeLast()
            entry.continuation.resume(returning: true)
        }
    }
}

/// A deadline that can be called off. Confined to its thread.
public final class IOTimer: @unchecked Sendable {
    private let thread: IOThread
    private var identifier: UInt64 = 0
    private var isCancelled = false

    public init(on thread: IOThread) {
        self.thread = thread
    }

    /// Waits until the deadline passes or ``cancel()`` is called. One wait per timer.
    ///
    /// - Returns: `true` when the deadline passed.
    public func wait(nanoseconds: UInt64) async -> Bool {
        if isCancelled { return false }
        let deadline = thread.now.adding(nanoseconds) ?? .max
        return await withUnsafeContinuation { continuation in
            identifier = thread.timers.nextIdentifier()
            thread.timers.insert(
                .init(deadline: deadline, identifier: identifier, continuation: continuation))
        }
    }

    public func cancel() {
        isCancelled = true
        thread.timers.cancel(identifier)
    }
}

extension IOThread {
    /// Suspends the calling task. On the thread only.
    public func sleep(nanoseconds: UInt64) async {
        _ = await IOTimer(on: self).wait(nanoseconds: nanoseconds)
    }
}
