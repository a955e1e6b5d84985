import BlockCore
import Testing

@Suite struct ClusterBitmapTests {
    /// Small generator, so that a failure names its seed.
    private struct Generator: RandomNumberGenerator {
        var state: UInt64
        mutating func next() -> UInt64 {
            state &+= 0x9e37_79b9_7f4a_7c15
            var value = state
            value = (value ^ (value >> 30)) &* 0xbf58_476d_1ce4_e5b9
            value = (value ^ (value >> 27)) &* 0x94d0_49bb_1331_11eb
            return value ^ (value >> 31)
        }
    }

    @Test(arguments: [0, 1, 63, 64, 65, 4095, 4096, 4097, 300_000])
    func allSetAndAllClear(count: Int) {
        var bitmap = ClusterBitmap(count: count, repeating: true)
        #expect(bitmap.setCount == count)
        #expect(bitmap.firstSet(in: 0..<count) == (count > 0 ? 0 : nil))
        #expect(bitmap.firstClear(in: 0..<count) == nil)
        bitmap.clear(0..<count)
        #expect(bitmap.isEmpty)
        #expect(bitmap.firstSet(in: 0..<count) == nil)
        #expect(bitmap.firstClear(in: 0..<count) == (count > 0 ? 0 : nil))
    }

    @Test func aLoneBitIsFoundFromAnywhere() {
        let count = 1 << 20
        for position in [0, 63, 64, 4095, 4096, 262_143, 262_144, count - 1] {
            var bitmap = ClusterBitmap(count: count)
            bitmap.set(position..<(position + 1))
            #expect(bitmap.firstSet(in: 0..<count) == position)
            #expect(bitmap.firstSet(in: position..<count) == position)
            #expect(bitmap.firstSet(in: 0..<position) == nil)
            #expect(bitmap.firstSet(in: (position + 1)..<count) == nil)
        }
    }

    @Test(arguments: 1...20) func agreesWithAListOfBits(seed: UInt64) {
        var generator = Generator(state: seed)
        let count = Int.random(in: 1...20_000, using: &generator)
        var bitmap = ClusterBitmap(count: count)
        var list = [Bool](repeating: false, count: count)
        for _ in 0..<200 {
            let start = Int.random(in: 0..<count, using: &generator)
            let length = Int.random(in: 0...min(count - start, 500), using: &generator)
            let value = Bool.random(using: &generator)
            if value {
                bitmap.set(start..<(start + length))
            } else {
                bitmap.clear(start..<(start + length))
            }
            for index in start..<(start + length) { list[index] = value }
            let from = Int.random(in: 0...count, using: &generator)
            let to = Int.random(in: from...count, using: &generator)
            #expect(
                bitmap.firstSet(in: from..<to) == list[from..<to].firstIndex(of: true),
                "seed \(seed)")
            #expect(
                bitmap.firstClear(in: from..<to) == list[from..<to].firstIndex(of: false),
                "seed \(seed)")
        }
        #expect(bitmap.setCount == list.count { $0 }, "seed \(seed)")
        #expect((0..<count).allSatisfy { bitmap[$0] == list[$0] }, "seed \(seed)")
    }
}
