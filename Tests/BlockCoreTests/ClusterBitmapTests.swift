import BlockCore
import BlockTesting
import Testing

@Suite struct ClusterBitmapTests {
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
        var generator = SeededRandom(seed: seed)
        let count = Int.random(in: 1...100_000, using: &generator)
        // Short ones change words, long ones whole pieces.
        let most = seed % 2 == 0 ? 500 : 50_000
        var bitmap = ClusterBitmap(count: count)
        var list = [Bool](repeating: false, count: count)
        for _ in 0..<200 {
            let start = Int.random(in: 0..<count, using: &generator)
            let length = Int.random(in: 0...min(count - start, most), using: &generator)
            let value = Bool.random(using: &generator)
            if value {
                bitmap.set(start..<(start + length))
            } else {
                bitmap.clear(start..<(start + length))
            }
            list.replaceSubrange(
                start..<(start + length), with: repeatElement(value, count: length))
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

    @Test func alikeBitsTakeNoMemory() {
        let count = 1 << 32
        var bitmap = ClusterBitmap(count: count, repeating: true)
        #expect(bitmap.wordBytes == 0 && bitmap.setCount == count)
        bitmap.clear(1 << 30..<1 << 31)
        #expect(bitmap.wordBytes == 0)
        #expect(bitmap.firstClear(in: 0..<count) == 1 << 30)
        #expect(bitmap.firstSet(in: 1 << 30..<count) == 1 << 31)
        bitmap.set(1 << 30 + 7..<1 << 30 + 8)
        #expect(bitmap.wordBytes > 0 && bitmap.wordBytes <= 4096)
        bitmap.clear(0..<count)
        #expect(bitmap.wordBytes == 0 && bitmap.isEmpty)
        #expect(bitmap.firstSet(in: 0..<count) == nil)
    }

    // MARK: Sizes, unions and bytes

    private static func random(_ count: Int, _ generator: inout SeededRandom) -> [Bool] {
        (0..<count).map { _ in Int.random(in: 0..<9, using: &generator) == 0 }
    }

    private static func bitmap(_ list: [Bool]) -> ClusterBitmap {
        var bitmap = ClusterBitmap(count: list.count)
        for (index, value) in list.enumerated() where value { bitmap.set(index..<(index + 1)) }
        return bitmap
    }

    /// Bits, count and the levels above agree with the list.
    private static func agrees(_ bitmap: ClusterBitmap, _ list: [Bool]) -> Bool {
        guard bitmap.count == list.count, bitmap.setCount == list.count(where: { $0 }) else {
            return false
        }
        var found = [Bool](repeating: false, count: list.count)
        var from = 0
        while let run = bitmap.firstRun(in: from..<list.count) {
            for index in run { found[index] = true }
            from = run.upperBound
        }
        return found == list
    }

    @Test(arguments: 1...20) func bitsThatAppearAreClear(seed: UInt64) {
        var generator = SeededRandom(seed: seed)
        var list = Self.random(Int.random(in: 0...90_000, using: &generator), &generator)
        var bitmap = Self.bitmap(list)
        for _ in 0..<10 {
            let count = Int.random(in: 0...90_000, using: &generator)
            bitmap.resize(to: count)
            list = (0..<count).map { $0 < list.count && list[$0] }
            #expect(Self.agrees(bitmap, list), "seed \(seed), \(count) bits")
        }
    }

    @Test(arguments: 1...20) func aUnionHasTheBitsOfBoth(seed: UInt64) {
        var generator = SeededRandom(seed: seed)
        let count = Int.random(in: 1...90_000, using: &generator)
        let lists = (0..<2).map { _ in Self.random(count, &generator) }
        var union = Self.bitmap(lists[0])
        union.formUnion(Self.bitmap(lists[1]))
        let expected = zip(lists[0], lists[1]).map { $0 || $1 }
        #expect(Self.agrees(union, expected), "seed \(seed)")
    }

    @Test(arguments: 1...20) func bytesGoOutAndComeBack(seed: UInt64) {
        var generator = SeededRandom(seed: seed)
        let count = Int.random(in: 1...40_000, using: &generator)
        let list = Self.random(count, &generator)
        let bitmap = Self.bitmap(list)
        var bytes = [UInt8](repeating: 0xff, count: bitmap.byteCount + 64)
        for offset in stride(from: 0, to: bytes.count, by: 8) {
            bytes.withUnsafeMutableBytes {
                bitmap.copyBytes(
                    from: offset,
                    to: UnsafeMutableRawBufferPointer(rebasing: $0[offset..<offset + 8]))
            }
        }
        for index in 0..<(bytes.count * 8) {
            let value = bytes[index / 8] >> UInt8(index % 8) & 1 == 1
            #expect(value == (index < count && list[index]), "seed \(seed), bit \(index)")
        }
        // What lies past the last bit is passed over.
        for index in count..<(bytes.count * 8) { bytes[index / 8] |= 1 << UInt8(index % 8) }
        var other = ClusterBitmap(count: count)
        bytes.withUnsafeBytes { other.formUnion(bytes: $0, at: 0) }
        #expect(Self.agrees(other, list), "seed \(seed)")
    }
}
