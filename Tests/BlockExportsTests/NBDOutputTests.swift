import BlockCore
import BlockIO
import Testing

@testable import BlockExports

/// Which messages leave together.
@Suite struct NBDOutputTests {
    /// Takes everything at once, and remembers how much in each call.
    private final class Recorder: NBDChannel, @unchecked Sendable {
        var sent: [Int] = []

        func sendNow(_ vector: IOVector) -> Int? {
            sent.append(vector.count)
            return vector.count
        }
        func send(_ vector: IOVector) async throws(BlockError) {}
        func receive(_ vector: IOVector, isLikelyThere: Bool) async throws(BlockError) -> Int { 0 }
        func untilTaken(nanosecondsMax: UInt64) async -> Bool { false }
        func shutdownReceiving() {}
        func shutdown() {}
        func close() {}
    }

    /// The sends for messages of 8 bytes, each the last of its reply or not, that are queued in one turn.
    private static func sends(
        _ areLast: [Bool], batchCountMax: Int
    ) async throws(BlockError) -> [Int] {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () throws(BlockError) in
            let recorder = Recorder()
            let output = NBDOutput(recorder, seat: IOSeat(on: thread))
            output.batchCountMax = batchCountMax
            for isLast in areLast {
                try output.append(capacity: 8, isLast: isLast) { _ in 8 }
            }
            await output.flush()
            return recorder.sent
        }
    }

    @Test func repliesLeaveSoManyAtATimeAndTheRestAtTheEndOfTheTurn() async throws {
        let sent = try await Self.sends(Array(repeating: true, count: 8), batchCountMax: 3)
        #expect(sent == [24, 24, 16])
    }

    @Test func partsOfAReplyLeaveWithItsEnd() async throws {
        let sent = try await Self.sends([false, false, true, false, true], batchCountMax: 1)
        #expect(sent == [24, 16])
    }
}
