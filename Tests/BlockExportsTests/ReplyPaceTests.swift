import Testing

@testable import BlockExports

struct ReplyPaceTests {
    private static func pace(_ counts: [Int]) -> ReplyPace {
        var pace = ReplyPace()
        for count in counts { pace.received(count) }
        return pace
    }

    @Test(arguments: [([], 1), ([0], 1), ([1], 1), ([2], 1), ([4], 1), ([8], 2), ([32], 10)])
    func repliesLeaveInThreeParts(of counts: [Int], count: Int) {
        #expect(Self.pace(counts).batchCount == count)
    }

    @Test func smallerReceivesBetweenDoNotChangeIt() {
        let counts = (0..<100).map { $0 % 10 == 0 ? 32 : 3 }
        #expect((8...10).contains(Self.pace(counts).batchCount))
    }

    @Test func whatAClientNoLongerDoesIsForgotten() {
        #expect(Self.pace([512] + Array(repeating: 2, count: 500)).batchCount == 1)
    }
}
