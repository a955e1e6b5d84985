import Testing

@testable import BlockCore

@Suite struct ZeroDetectionTests {
    private func runs(_ bytes: [UInt8], unit: Int, phase: Int = 0) -> [String] {
        var result: [String] = []
        bytes.withUnsafeBytes { memory in
            var offset = 0
            while offset < memory.count {
                let run = ZeroDetection.run(in: memory, from: offset, unit: unit, phase: phase)
                result.append("\(run.isZero ? "z" : "d")\(run.end - offset)")
                offset = run.end
            }
        }
        return result
    }

    @Test(
        "runs end where a unit is of the other kind",
        arguments: [
            ([], 4096, 0, ["z10000"]), ([0], 4096, 0, ["d4096", "z5904"]),
            ([9999], 4096, 0, ["z8192", "d1808"]), ([5000], 4096, 0, ["z4096", "d4096", "z1808"]),
            ([5000], 512, 0, ["z4608", "d512", "z4880"]),
            ([100, 5000], 4096, 4000, ["z96", "d8192", "z1712"]),
            ([0, 4096, 8192], 4096, 0, ["d10000"]), ([4095], 1536, 0, ["z3072", "d1536", "z5392"]),
        ] as [([Int], Int, Int, [String])])
    func runs(_ places: [Int], _ unit: Int, _ phase: Int, _ expected: [String]) {
        var bytes = [UInt8](repeating: 0, count: 10000)
        for place in places { bytes[place] = 1 }
        #expect(runs(bytes, unit: unit, phase: phase) == expected)
    }

    @Test("one byte that is not zero is found wherever it stands", arguments: 0..<200)
    func single(_ place: Int) {
        var bytes = [UInt8](repeating: 0, count: 200)
        #expect(bytes.withUnsafeBytes { ZeroDetection.isZero($0) })
        bytes[place] = 0x80
        #expect(!bytes.withUnsafeBytes { ZeroDetection.isZero($0) })
    }
}
