import BlockCore
import BlockTesting
import Testing

@testable import BlockGraph

@Suite struct RequestTrackerTests {
    private struct Flight {
        let request: RequestTracker.Request
        let range: ByteRange
        let isSerialising: Bool
    }

    /// Sizes from one byte to beyond the largest zone, at places where they meet and where they do not.
    private static func range(_ random: inout SeededRandom) -> ByteRange {
        let count = 1 << random.below(random.below(2) == 0 ? 40 : 18)
        return ByteRange(
            random.below(1 << 20) << random.below(12), count + random.below(count))
    }

    @Test(arguments: 1...8 as ClosedRange<UInt64>)
    func whatIsInTheWayIsTheNewestOfTheEarlierOnesThatOverlap(_ seed: UInt64) {
        var random = SeededRandom(seed: seed)
        var tracker = RequestTracker()
        var flights: [Flight] = []
        for _ in 0..<3000 {
            if flights.count > 200 || !flights.isEmpty && random.below(2) == 0 {
                tracker.leave(flights.remove(at: random.below(flights.count)).request)
            } else {
                let range = Self.range(&random)
                let isSerialising = random.below(4) == 0
                let request = tracker.enter(range, serialising: isSerialising)
                flights.append(
                    Flight(request: request, range: range, isSerialising: isSerialising))
            }
            guard !flights.isEmpty else { continue }
            let index = random.below(flights.count)
            let asked = flights[index]
            let expected = flights[..<index].last {
                $0.range.overlaps(asked.range) && ($0.isSerialising || asked.isSerialising)
            }
            #expect(tracker.obstacle(of: asked.request) == expected?.request)
        }
        for flight in flights { tracker.leave(flight.request) }
        #expect(tracker.allowsImmediateWrites)
    }

    @Test func ofAPileOnOneBlockEachWaitsForTheOneBefore() {
        var tracker = RequestTracker()
        let requests = (0..<100).map { _ in
            tracker.enter(ByteRange(4096, 512), serialising: true)
        }
        #expect(tracker.obstacle(of: requests[0]) == nil)
        for (before, request) in zip(requests, requests.dropFirst()) {
            #expect(tracker.obstacle(of: request) == before)
        }
        // One that leaves lets the next one begin, and changes nothing for the others.
        tracker.leave(requests[0])
        #expect(tracker.obstacle(of: requests[1]) == nil)
        #expect(tracker.obstacle(of: requests[99]) == requests[98])
    }
}
