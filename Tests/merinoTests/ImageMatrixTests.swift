import BlockTesting
import Foundation
import Testing

/// Images made by either tool, worked on by both, pass the other's check, compare and info: over creation
/// options, operations and random requests that follow from a seed.
///
/// `MERINO_MATRIX=full` goes through all combinations of creation options, `MERINO_SIMULATION_SEEDS=1000`
/// through more of them at random.
@Suite struct ImageMatrixTests {
    private static let seeds: Range<UInt64> = {
        let environment = ProcessInfo.processInfo.environment
        if environment["MERINO_MATRIX"] == "full" { return 0..<UInt64(ImageLayout.count) }
        return 0..<(environment["MERINO_SIMULATION_SEEDS"].flatMap(UInt64.init) ?? 8)
    }()

    @Test("either tool's images pass the other's check, compare and info", arguments: seeds)
    func images(_ seed: UInt64) throws {
        let isFull = ProcessInfo.processInfo.environment["MERINO_MATRIX"] == "full"
        let trial = try ImageTrial(seed, number: isFull ? Int(seed) : nil)
        try trial.begin()
        try trial.check()
        for _ in 0..<(isFull ? 3 : 6) {
            try trial.step()
            try trial.check()
        }
    }
}
