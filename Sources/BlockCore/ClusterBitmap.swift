/// A bit per cluster, with levels above that say where bits are set: what dirty bitmaps and
/// copy-before-write keep their bits in.
///
/// Level 0 holds the bits; bit `i` of a level above says that word `i` of the level below is not
/// zero. Finding the next set bit in 64 TiB is then a handful of loads, however sparse it is.
///
/// Invariant: bit `w` of level `n + 1` is set exactly when word `w` of level `n` is not zero.
public struct ClusterBitmap: Sendable {
    /// Level 0 first; the last level is one word.
    private var levels: [[UInt64]]
    /// Bits in all.
    public private(set) var count: Int
    /// Bits that are set.
    public private(set) var setCount = 0

    /// How many units of `unit` bytes cover `size` bytes; `nil` when a bitmap cannot have so many.
    public static func count(covering size: Int, unit: Int) -> Int? {
        guard size > 0 else { return 0 }
        let count = (size - 1) / unit + 1
        return count <= Limits.bitmapBitCountMax ? count : nil
    }

    /// All bits clear, or all set. `count` is not negative.
    public init(count: Int, repeating value: Bool = false) {
        precondition(count >= 0)
        self.count = count
        levels = [[UInt64](repeating: 0, count: max((count + 63) / 64, 1))]
        addUpperLevels()
        if value { set(0..<count) }
    }

    /// Derives all levels above the bits, and how many are set.
    private mutating func addUpperLevels() {
        levels.removeLast(levels.count - 1)
        setCount = 0
        for word in levels[0] where word != 0 { setCount += word.nonzeroBitCount }
        while let below = levels.last, below.count > 1 {
            var level = [UInt64](repeating: 0, count: (below.count + 63) / 64)
            for (index, word) in below.enumerated() where word != 0 {
                level[index >> 6] |= 1 << UInt64(index & 63)
            }
            levels.append(level)
        }
    }

    /// Traps when out of bounds.
    @inline(__always)
    public subscript(index: Int) -> Bool {
        precondition(index >= 0 && index < count)
        return levels[0][index >> 6] & (1 << UInt64(index & 63)) != 0
    }

    /// Whether no bit is set.
    public var isEmpty: Bool { setCount == 0 }

    /// Sets bits. Traps when out of bounds.
    public mutating func set(_ range: Range<Int>) {
        forEachWord(range) { bitmap, word, mask in
            let old = bitmap.levels[0][word]
            bitmap.levels[0][word] = old | mask
            bitmap.setCount += (mask & ~old).nonzeroBitCount
            if old == 0 { bitmap.raise(word) }
        }
    }

    /// Clears bits. Traps when out of bounds.
    public mutating func clear(_ range: Range<Int>) {
        forEachWord(range) { bitmap, word, mask in
            let old = bitmap.levels[0][word]
            bitmap.levels[0][word] = old & ~mask
            bitmap.setCount -= (mask & old).nonzeroBitCount
            if old != 0, old & ~mask == 0 { bitmap.lower(word) }
        }
    }

    /// The first set bit in `range`.
    public func firstSet(in range: Range<Int>) -> Int? {
        precondition(range.lowerBound >= 0 && range.upperBound <= count)
        if range.isEmpty { return nil }
        var word = range.lowerBound >> 6
        let head = levels[0][word] & (~0 << UInt64(range.lowerBound & 63))
        if head != 0 { return within(range, (word << 6) + head.trailingZeroBitCount) }
        // Up while there is nothing to the right, then down to the first bit.
        var level = 0
        while level + 1 < levels.count {
            let next = word + 1
            level += 1
            guard next >> 6 < levels[level].count else { return nil }
            let rest = levels[level][next >> 6] & (~0 << UInt64(next & 63))
            if rest != 0 {
                word = ((next >> 6) << 6) + rest.trailingZeroBitCount
                while level > 0 {
                    level -= 1
                    let bits = levels[level][word]
                    if level == 0 {
                        return within(range, (word << 6) + bits.trailingZeroBitCount)
                    }
                    word = (word << 6) + bits.trailingZeroBitCount
                }
            }
            word = next >> 6
        }
        return nil
    }

    /// The first clear bit in `range`.
    public func firstClear(in range: Range<Int>) -> Int? {
        precondition(range.lowerBound >= 0 && range.upperBound <= count)
        var index = range.lowerBound
        while index < range.upperBound {
            let bits = ~levels[0][index >> 6] & (~0 << UInt64(index & 63))
            if bits != 0 { return within(range, ((index >> 6) << 6) + bits.trailingZeroBitCount) }
            index = (index >> 6 + 1) << 6
        }
        return nil
    }

    /// The first run of set bits in `range`, as far as it reaches in it.
    public func firstRun(in range: Range<Int>) -> Range<Int>? {
        guard let first = firstSet(in: range) else { return nil }
        return first..<(firstClear(in: first..<range.upperBound) ?? range.upperBound)
    }

    /// Adds or drops bits at the end; those that appear are clear.
    public mutating func resize(to count: Int) {
        precondition(count >= 0)
        if count < self.count { clear(count..<self.count) }
        self.count = count
        let words = max((count + 63) / 64, 1)
        let old = levels[0].count
        guard words != old else { return }
        if words < old {
            levels[0].removeLast(old - words)
        } else {
            levels[0].append(contentsOf: repeatElement(0, count: words - old))
        }
        addUpperLevels()
    }

    /// Sets the bits that are set in `other`, which has as many.
    public mutating func formUnion(_ other: ClusterBitmap) {
        precondition(other.count == count)
        var next = other.firstSet(in: 0..<count)
        while let bit = next {
            let index = bit >> 6
            merge(other.levels[0][index], into: index)
            next = other.firstSet(in: min((index + 1) << 6, count)..<count)
        }
    }

    // MARK: Bytes

    /// The bytes that all bits take: whole words of 64 bits, one at least.
    public var byteCount: Int { levels[0].count * 8 }

    /// Copies bits out: bit `i` of the bitmap is bit `i % 8`, from the least significant on, of byte
    /// `i / 8`. What lies past the last bit is zero.
    ///
    /// - Parameter offset: of the first byte; a multiple of 8, as is the length of `memory`.
    public func copyBytes(from offset: Int, to memory: UnsafeMutableRawBufferPointer) {
        precondition(offset >= 0 && (offset | memory.count).isAligned(to: 8))
        for position in stride(from: 0, to: memory.count, by: 8) {
            let index = (offset + position) >> 3
            let word = index < levels[0].count ? levels[0][index] : 0
            memory.storeLittleEndian(word, at: position)
        }
    }

    /// Sets the bits that are set in `memory`, laid out as by ``copyBytes(from:to:)``. What lies past
    /// the last bit is passed over.
    public mutating func formUnion(bytes memory: UnsafeRawBufferPointer, at offset: Int) {
        precondition(offset >= 0 && (offset | memory.count).isAligned(to: 8))
        for position in stride(from: 0, to: memory.count, by: 8) {
            let index = (offset + position) >> 3
            guard index < (count + 63) / 64 else { return }
            var word: UInt64 = memory.littleEndian(at: position)
            if index == count >> 6 { word &= (1 << UInt64(count & 63)) - 1 }
            merge(word, into: index)
        }
    }

    // MARK: Words

    private mutating func merge(_ word: UInt64, into index: Int) {
        let old = levels[0][index]
        guard word & ~old != 0 else { return }
        levels[0][index] = old | word
        setCount += (word & ~old).nonzeroBitCount
        if old == 0 { raise(index) }
    }

    private func within(_ range: Range<Int>, _ index: Int) -> Int? {
        index < range.upperBound ? index : nil
    }

    private mutating func forEachWord(
        _ range: Range<Int>, _ body: (inout ClusterBitmap, Int, UInt64) -> Void
    ) {
        precondition(range.lowerBound >= 0 && range.upperBound <= count)
        var index = range.lowerBound
        while index < range.upperBound {
            let end = min(range.upperBound, (index >> 6 + 1) << 6)
            let width = end - index
            let mask: UInt64 = width == 64 ? ~0 : ((1 << UInt64(width)) - 1) << UInt64(index & 63)
            body(&self, index >> 6, mask)
            index = end
        }
    }

    private mutating func raise(_ word: Int) {
        var index = word
        for level in levels.indices.dropFirst() {
            let old = levels[level][index >> 6]
            levels[level][index >> 6] = old | (1 << UInt64(index & 63))
            if old != 0 { return }
            index >>= 6
        }
    }

    private mutating func lower(_ word: Int) {
        var index = word
        for level in levels.indices.dropFirst() {
            levels[level][index >> 6] &= ~(1 << UInt64(index & 63))
            if levels[level][index >> 6] != 0 { return }
            index >>= 6
        }
    }
}
