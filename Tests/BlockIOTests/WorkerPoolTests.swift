import Synchronization
import Testing

@testable import BlockIO

@Suite struct WorkerPoolTests {
    private final class Seen: Sendable {
        let state = Mutex<(running: Int, most: Int, done: Int)>((0, 0, 0))
    }

    private final class Released: Sendable {
        private let state = Mutex(false)
        var isSet: Bool { state.withLock { $0 } }
        func set() { state.withLock { $0 = true } }
    }

    /// Submits `count` pieces of work, each of which waits until as many run as may.
    ///
    /// - Returns: how many ran at the same time at most.
    private static func most(of count: Int, at once: Int, in pool: WorkerPool) async -> Int {
        let seen = Seen()
        await withUnsafeContinuation { (over: UnsafeContinuation<Void, Never>) in
            for _ in 0..<count {
                pool.submit {
                    seen.state.withLock {
                        $0.running += 1
                        $0.most = max($0.most, $0.running)
                    }
                    while seen.state.withLock({ $0.most < once }) {}
                    let isLast = seen.state.withLock {
                        $0.running -= 1
                        $0.done += 1
                        return $0.done == count
                    }
                    if isLast { over.resume() }
                }
            }
        }
        return seen.state.withLock { $0.most }
    }

    @Test func noMoreThreadsWorkThanMay() async {
        let pool = WorkerPool(threadCountMax: 2)
        #expect(await Self.most(of: 20, at: 2, in: pool) == 2)
        #expect(pool.threadCount <= 2)
        pool.setThreadCounts(least: 0, most: 1)
        #expect(await Self.most(of: 20, at: 1, in: pool) == 1)
        pool.setThreadCounts(least: 0, most: 3)
        #expect(await Self.most(of: 20, at: 3, in: pool) == 3)
    }

    @Test func threadsAreThereBeforeThereIsWork() {
        let pool = WorkerPool(threadCountMax: 8)
        #expect(pool.threadCount == 0)
        pool.setThreadCounts(least: 3, most: 8)
        #expect(pool.threadCount == 3)
        pool.setThreadCounts(least: 0, most: 8)
    }

    @Test func whatWaitsBeginsWhenThereMayBeMoreThreads() async {
        let pool = WorkerPool(threadCountMax: 1)
        await withUnsafeContinuation { (over: UnsafeContinuation<Void, Never>) in
            let state = Released()
            pool.submit {
                while !state.isSet {}
                over.resume()
            }
            // Nobody submits anything after this.
            pool.submit { state.set() }
            pool.setThreadCounts(least: 0, most: 2)
        }
    }

    @Test func aPoolHasAtLeastOneThreadAndNotTooMany() async {
        let pool = WorkerPool(threadCountMax: 1)
        pool.setThreadCounts(least: -1, most: 0)
        #expect(await Self.most(of: 2, at: 1, in: pool) == 1)
        pool.setThreadCounts(least: 0, most: .max)
    }
}
