import Synchronization

/// Work for a worker pool that is done one piece at a time, in the order it came.
///
/// For what would only wait for each other: a worker goes from one piece to the next without a trip
/// through the thread that submitted them, and none of the others spins meanwhile.
final class WorkLane: Sendable {
    private struct State {
        /// Behind what is being done.
        var waiting: [@Sendable () -> Void] = []
        var isBusy = false
    }

    private let state = Mutex(State())

    /// Runs `work` on a worker thread once all that was submitted before is done.
    ///
    /// - Parameter pool: whose, where nothing is under way; work that waits is done by the one that is busy.
    func submit(
        to pool: WorkerPool = .shared, _ work: @escaping @Sendable () -> Void
    ) {
        let starts = state.withLock { state in
            state.waiting.append(work)
            defer { state.isBusy = true }
            return !state.isBusy
        }
        if starts { pool.submit { self.drain() } }
    }

    private func drain() {
        while true {
            let next = state.withLock { state in
                let next = state.waiting
                state.waiting = []
                if next.isEmpty { state.isBusy = false }
                return next
            }
            if next.isEmpty { return }
            for work in next { work() }
        }
    }
}
