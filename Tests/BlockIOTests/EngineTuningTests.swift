import BlockCore
import Testing

@testable import BlockIO

@Suite struct EngineTuningTests {
    #if os(Linux)
    private static func window(
        growth: UInt64 = 0, shrinkage: UInt64 = 0, max: UInt64 = 100_000
    ) -> PollWindow {
        var tuning = EngineTuning()
        tuning.pollNanosecondsMax = max
        tuning.pollGrowth = growth
        tuning.pollShrinkage = shrinkage
        return PollWindow(tuning)
    }

    private static let growing: [(UInt64, [UInt64])] = [
        (0, [8_000, 16_000, 32_000, 64_000, 100_000]), (1, [8_000, 8_000, 8_000]),
        (5, [8_000, 40_000, 100_000]), (.max, [8_000, 100_000, 100_000]),
    ]
    private static let shrinking: [(UInt64, [UInt64])] = [
        (0, [0, 0]), (1, [8_000, 8_000]), (2, [4_000, 2_000]), (.max, [0, 0]),
    ]

    @Test(arguments: Self.growing)
    func lookingGrowsByItsFactor(growth: UInt64, expected: [UInt64]) {
        var window = Self.window(growth: growth)
        let seen = expected.map { _ in
            window.slept(nanoseconds: 1_000)
            return window.nanoseconds
        }
        #expect(seen == expected)
    }

    @Test(arguments: Self.shrinking)
    func lookingShrinksByItsDivisor(shrinkage: UInt64, expected: [UInt64]) {
        var window = Self.window(shrinkage: shrinkage)
        window.slept(nanoseconds: 1_000)
        // One that does not pay may be chance.
        window.slept(nanoseconds: 1_000_000)
        #expect(window.nanoseconds == 8_000)
        let seen = expected.map { _ in
            window.slept(nanoseconds: 1_000_000)
            return window.nanoseconds
        }
        #expect(seen == expected)
    }

    @Test func whoMayNotLookDoesNot() {
        var window = Self.window(max: 0)
        window.slept(nanoseconds: 0)
        #expect(window.nanoseconds == 0)
    }
    #endif

    @Test(arguments: [1, 3, 1_000]) func allOperationsOfABatchEnd(batchCountMax: Int) async throws {
        let path = "/tmp/merino-batch-\(UInt64.random(in: 0 ... .max))"
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let counts = try await thread.run { () async throws(BlockError) -> [Int] in
            thread.tuning.batchCountMax = batchCountMax
            let file = try await File.open(
                path, FileOptions(writable: true, create: true), on: thread)
            let handle = file.handle
            try thread.system.remove(path)
            var tasks: [Task<Void, Never>] = []
            let results = Results()
            for index in 0..<20 {
                tasks.append(
                    thread.spawn {
                        guard let vector = try? IOVector(allocating: 512) else { return }
                        vector.fill(UInt8(index + 1))
                        let count = await thread.perform(
                            .write(handle, vector, offset: index * 512, durable: false))
                        results.counts.append(count)
                    })
            }
            for task in tasks { await task.value }
            await file.close()
            return results.counts
        }
        #expect(counts == [Int](repeating: 512, count: 20))
    }

    private final class Results: @unchecked Sendable {
        var counts: [Int] = []
    }
}
