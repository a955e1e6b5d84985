import BlockCore
import Testing

@testable import BlockIO

/// Used on one thread.
private final class Waiters: @unchecked Sendable {
    let queue = WaitQueue()
    var waiting = 0
    var woken: [Int] = []

    func wait(_ index: Int) async {
        waiting += 1
        await queue.wait()
        woken.append(index)
    }

    func untilWoken(_ count: Int) async {
        while woken.count < count { await Task.yield() }
    }
}

@Suite struct WaitQueueTests {
    @Test func allAreWokenInTheirOrderAndWhoWaitsAgainWithTheNext() async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let woken = try await thread.run { () async throws(BlockError) in
            let waiters = Waiters()
            // Nobody is there: it is not kept for who comes.
            waiters.queue.wakeAll()
            for index in 0..<3 {
                thread.spawn {
                    await waiters.wait(index)
                    if index == 0 { await waiters.wait(3) }
                }
                while waiters.waiting <= index { await Task.yield() }
            }
            waiters.queue.wakeAll()
            await waiters.untilWoken(3)
            while waiters.waiting < 4 { await Task.yield() }
            let first = waiters.woken
            waiters.queue.wakeAll()
            await waiters.untilWoken(4)
            return [first, waiters.woken]
        }
        #expect(woken == [[0, 1, 2], [0, 1, 2, 3]])
    }
}
