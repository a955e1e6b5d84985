import BlockCore
import BlockIO
import Testing

@testable import ImageTools

@Suite struct ProgressTests {
    private final class Lines: @unchecked Sendable {
        var text = ""
        var machine = ""
        var now: UInt64 = 0
    }

    @Test func percentIsShownAtEachStepOfOne() {
        let lines = Lines()
        let progress = Progress(.percent, print: { lines.text += $0 })
        progress.begin(1000)
        for _ in 0..<25 { progress.advance(1) }
        progress.finish()
        let expected = ["0.00", "1.00", "2.00", "100.00"].map { "    (\($0)/100%)\r" }
        #expect(lines.text == expected.joined() + "\n")
    }

    @Test func barHasRateAndTimeLeft() {
        let lines = Lines()
        let progress = Progress(.bar, clock: { lines.now }, print: { lines.text = $0 })
        progress.begin(10 << 20)
        lines.now += 2_000_000_000
        progress.advance(4 << 20)
        #expect(lines.text.contains("40.00 %") && lines.text.contains("2 MiB/s"))
        #expect(lines.text.contains("0:03 left"))
    }

    @Test func nothingToDoIsDone() {
        let lines = Lines()
        let progress = Progress(.silent, machine: { lines.machine += $0 })
        progress.begin(0)
        progress.finish()
        #expect(lines.machine.hasSuffix("{\"done\": 0, \"total\": 0, \"percent\": 100.00}\n"))
        #expect(lines.text == "")
    }

    @Test(
        "times are read as clocks are",
        arguments: [(0.0, "0:00"), (61.4, "1:01"), (3723, "1:02:03"), (1e12, "277777:46:40")])
    func durations(_ seconds: Double, _ text: String) {
        #expect(Progress.duration(seconds) == text)
    }
}

@Suite struct WorkersTests {
    private final class Record: @unchecked Sendable {
        var order: [Int] = []
        var taken = 0
    }

    @Test func itemsPassInTheirOrder() throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let record = Record()
        try thread.runBlocking { () async throws(BlockError) in
            let turnstile = Turnstile()
            try await Workers.run(5, on: thread) { () async throws(BlockError) in
                let index = record.taken
                guard index < 40 else { return false }
                record.taken += 1
                // Later ones are ready earlier.
                await thread.sleep(nanoseconds: UInt64(5 - index % 5) * 200_000)
                await turnstile.wait(for: index)
                record.order.append(index)
                turnstile.pass(index)
                return true
            }
        }
        #expect(record.order == Array(0..<40))
    }

    @Test func theFirstFailureEndsAll() throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let record = Record()
        #expect(throws: BlockError(.noSpace, "full")) {
            try thread.runBlocking { () async throws(BlockError) in
                try await Workers.run(3, on: thread) { () async throws(BlockError) in
                    record.taken += 1
                    if record.taken == 10 { throw BlockError(.noSpace, "full") }
                    await thread.sleep(nanoseconds: 1000)
                    return true
                }
            }
        }
        #expect(record.taken < 20)
    }

    @Test func aRateIsKept() throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let nanoseconds = try thread.runBlocking { () async throws(BlockError) -> UInt64 in
            let start = thread.now
            let limit = RateLimit(10 << 20, on: thread)
            for _ in 0..<4 { await limit?.admit(1 << 20) }
            return thread.now - start
        }
        // Three megabytes are paid for before the fourth goes, less what may go ahead.
        #expect(nanoseconds >= 200_000_000)
    }
}
