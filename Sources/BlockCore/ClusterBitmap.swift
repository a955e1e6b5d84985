/// A bit per cluster: what dirty bitmaps and copy-before-write keep their bits in.
///
/// ```
/// summaries    a bit per piece: it has a set bit          a bit per piece: it has a clear bit
///                       │                                          │
/// pieces       all clear: no memory │ all set: no memory │ mixed: 32768 bits in words │ …
/// ```
/// A bitmap takes memory where its bits differ: of a disk of 16 TiB in units of 4 KiB, all clean or all
/// dirty, 2 MiB. The next set or clear bit is found by a walk through one piece, the summary, and another
/// piece: a thousand loads and a word of summary for every 2 million bits.
///
/// Invariants:
/// 1. A piece has words exactly when some of its bits are set and some are not.
/// 2. Of the words of the last piece, bits past ``count`` are zero.
/// 3. `setCounts`, ``setCount`` and the summaries say what the pieces do.
public struct ClusterBitmap: Sendable {
    private static let pieceShift = 15
    private static let pieceBits = 1 << pieceShift

    /// The words of each piece; none where its bits are all alike.
    private var pieces: [[UInt64]]
    /// Bits that are set in each piece.
    private var setCounts: [Int32]
    private var someSet: [UInt64] = []
    private var someClear: [UInt64] = []
    /// Bits in all.
    public private(set) var count: Int
    /// Bits that are set.
    public private(set) var setCount = 0
    /// Memory that words take, in bytes.
    public private(set) var wordBytes = 0

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
        let number = Self.pieceCount(count)
        pieces = [[UInt64]](repeating: [], count: number)
        setCounts = [Int32](repeating: 0, count: number)
        summarise()
        if value { set(0..<count) }
    }

    private static func pieceCount(_ count: Int) -> Int { (count + pieceBits - 1) >> pieceShift }

    /// Bits of a piece.
    @inline(__always)
    private func width(_ piece: Int) -> Int {
        min(Self.pieceBits, count - piece << Self.pieceShift)
    }

    /// Derives the summaries, and how many bits are set.
    private mutating func summarise() {
        let words = (pieces.count + 63) >> 6
        someSet = [UInt64](repeating: 0, count: words)
        someClear = [UInt64](repeating: 0, count: words)
        setCount = 0
        wordBytes = 0
        for piece in pieces.indices {
            note(piece)
            setCount += Int(setCounts[piece])
            wordBytes += pieces[piece].count << 3
        }
    }

    /// Brings the summaries up to date on one piece.
    @inline(__always)
    private mutating func note(_ piece: Int) {
        let bit: UInt64 = 1 << UInt64(piece & 63)
        let isSet = setCounts[piece] > 0
        let isClear = Int(setCounts[piece]) < width(piece)
        someSet[piece >> 6] = isSet ? someSet[piece >> 6] | bit : someSet[piece >> 6] & ~bit
        someClear[piece >> 6] = isClear ? someClear[piece >> 6] | bit : someClear[piece >> 6] & ~bit
    }

    /// Traps when out of bounds.
    @inline(__always)
    public subscript(index: Int) -> Bool {
        precondition(index >= 0 && index < count)
        let piece = index >> Self.pieceShift
        if pieces[piece].isEmpty { return setCounts[piece] > 0 }
        return pieces[piece][index >> 6 & 511] & (1 << UInt64(index & 63)) != 0
    }

    /// Whether no bit is set.
    public var isEmpty: Bool { setCount == 0 }

    // MARK: Changes

    /// Sets bits. Traps when out of bounds.
    public mutating func set(_ range: Range<Int>) { change(range, to: true) }

    /// Clears bits. Traps when out of bounds.
    public mutating func clear(_ range: Range<Int>) { change(range, to: false) }

    private mutating func change(_ range: Range<Int>, to value: Bool) {
        precondition(range.lowerBound >= 0 && range.upperBound <= count)
        var start = range.lowerBound
        while start < range.upperBound {
            let piece = start >> Self.pieceShift
            let first = piece << Self.pieceShift
            let end = min(range.upperBound, first + Self.pieceBits)
            change(piece, start - first..<end - first, to: value)
            start = end
        }
    }

    /// Changes bits of one piece, counted from its start.
    private mutating func change(_ piece: Int, _ range: Range<Int>, to value: Bool) {
        let width = width(piece)
        let goal = value ? width : 0
        if Int(setCounts[piece]) == goal { return }
        guard range.count < width else { return settle(piece, goal) }
        expand(piece)
        var counted = Int(setCounts[piece])
        var index = range.lowerBound
        while index < range.upperBound {
            let end = min(range.upperBound, (index >> 6 + 1) << 6)
            let bits = end - index
            let mask: UInt64 = bits == 64 ? ~0 : ((1 << UInt64(bits)) - 1) << UInt64(index & 63)
            let old = pieces[piece][index >> 6]
            let new = value ? old | mask : old & ~mask
            counted += new.nonzeroBitCount - old.nonzeroBitCount
            pieces[piece][index >> 6] = new
            index = end
        }
        settle(piece, counted)
    }

    /// Gives a piece words, that it may become mixed.
    private mutating func expand(_ piece: Int) {
        guard pieces[piece].isEmpty else { return }
        let width = width(piece)
        let isSet = setCounts[piece] > 0
        var words = [UInt64](repeating: isSet ? ~0 : 0, count: (width + 63) >> 6)
        if isSet, width & 63 != 0 { words[words.count - 1] = (1 << UInt64(width & 63)) - 1 }
        wordBytes += words.count << 3
        pieces[piece] = words
    }

    /// Takes the number of bits that are set in a piece now, and its words where they are all alike.
    @inline(__always)
    private mutating func settle(_ piece: Int, _ counted: Int) {
        setCount += counted - Int(setCounts[piece])
        setCounts[piece] = Int32(truncatingIfNeeded: counted)
        if counted == 0 || counted == width(piece) {
            wordBytes -= pieces[piece].count << 3
            pieces[piece] = []
        }
        note(piece)
    }

    /// Adds or drops bits at the end; those that appear are clear.
    public mutating func resize(to count: Int) {
        precondition(count >= 0)
        guard count != self.count else { return }
        if count < self.count { clear(count..<self.count) }
        let last = min(Self.pieceCount(count), pieces.count) - 1
        // Its width changes, and with it what "all" means.
        if last >= 0 { expand(last) }
        self.count = count
        let number = Self.pieceCount(count)
        if number < pieces.count {
            pieces.removeLast(pieces.count - number)
            setCounts.removeLast(setCounts.count - number)
        } else {
            pieces.append(contentsOf: repeatElement([], count: number - pieces.count))
            setCounts.append(contentsOf: repeatElement(0, count: number - setCounts.count))
        }
        if last >= 0 {
            let words = (width(last) + 63) >> 6
            let old = pieces[last].count
            if words < old {
                pieces[last].removeLast(old - words)
            } else {
                pieces[last].append(contentsOf: repeatElement(0, count: words - old))
            }
        }
        summarise()
        if last >= 0 { settle(last, Int(setCounts[last])) }
    }

    /// Sets the bits that are set in `other`, which has as many.
    public mutating func formUnion(_ other: ClusterBitmap) {
        precondition(other.count == count)
        for piece in pieces.indices where other.setCounts[piece] > 0 {
            let words = other.pieces[piece]
            guard !words.isEmpty else {
                change(piece, 0..<width(piece), to: true)
                continue
            }
            let first = piece << (Self.pieceShift - 6)
            for (index, word) in words.enumerated() { merge(word, into: first + index) }
        }
    }

    // MARK: Questions

    /// The first set bit in `range`.
    public func firstSet(in range: Range<Int>) -> Int? { first(true, in: range) }

    /// The first clear bit in `range`.
    public func firstClear(in range: Range<Int>) -> Int? { first(false, in: range) }

    private func first(_ value: Bool, in range: Range<Int>) -> Int? {
        precondition(range.lowerBound >= 0 && range.upperBound <= count)
        var from = range.lowerBound
        while from < range.upperBound {
            let piece = from >> Self.pieceShift
            if let bit = first(value, in: piece, from: from & (Self.pieceBits - 1)) {
                let index = piece << Self.pieceShift + bit
                return index < range.upperBound ? index : nil
            }
            guard let next = nextPiece(with: value, from: piece + 1) else { return nil }
            from = next << Self.pieceShift
        }
        return nil
    }

    /// The first such bit of a piece, counted from its start; perhaps past the last one.
    private func first(_ value: Bool, in piece: Int, from start: Int) -> Int? {
        let words = pieces[piece]
        if words.isEmpty { return (setCounts[piece] > 0) == value ? start : nil }
        var mask: UInt64 = ~0 << UInt64(start & 63)
        for index in start >> 6..<words.count {
            let bits = (value ? words[index] : ~words[index]) & mask
            if bits != 0 { return index << 6 + bits.trailingZeroBitCount }
            mask = ~0
        }
        return nil
    }

    /// The first piece from `start` on that has such a bit.
    private func nextPiece(with value: Bool, from start: Int) -> Int? {
        let summary = value ? someSet : someClear
        guard start < pieces.count else { return nil }
        var mask: UInt64 = ~0 << UInt64(start & 63)
        for index in start >> 6..<summary.count {
            let bits = summary[index] & mask
            if bits != 0 { return index << 6 + bits.trailingZeroBitCount }
            mask = ~0
        }
        return nil
    }

    /// The first run of set bits in `range`, as far as it reaches in it.
    public func firstRun(in range: Range<Int>) -> Range<Int>? {
        guard let first = firstSet(in: range) else { return nil }
        return first..<(firstClear(in: first..<range.upperBound) ?? range.upperBound)
    }

    // MARK: Bytes

    /// The bytes that all bits take when copied out: whole words of 64 bits, one at least.
    public var byteCount: Int { max((count + 63) >> 6, 1) << 3 }

    /// Copies bits out: bit `i` of the bitmap is bit `i % 8`, from the least significant on, of byte
    /// `i / 8`. What lies past the last bit is zero.
    ///
    /// - Parameter offset: of the first byte; a multiple of 8, as is the length of `memory`.
    public func copyBytes(from offset: Int, to memory: UnsafeMutableRawBufferPointer) {
        precondition(offset >= 0 && (offset | memory.count).isAligned(to: 8))
        for position in stride(from: 0, to: memory.count, by: 8) {
            memory.storeLittleEndian(word((offset + position) >> 3), at: position)
        }
    }

    /// Sets the bits that are set in `memory`, laid out as by ``copyBytes(from:to:)``. What lies past
    /// the last bit is passed over.
    public mutating func formUnion(bytes memory: UnsafeRawBufferPointer, at offset: Int) {
        precondition(offset >= 0 && (offset | memory.count).isAligned(to: 8))
        for position in stride(from: 0, to: memory.count, by: 8) {
            let index = (offset + position) >> 3
            guard index < (count + 63) >> 6 else { return }
            var word: UInt64 = memory.littleEndian(at: position)
            if index == count >> 6 { word &= (1 << UInt64(count & 63)) - 1 }
            merge(word, into: index)
        }
    }

    // MARK: Words

    /// Word `index` of all bits; zero past the last one.
    private func word(_ index: Int) -> UInt64 {
        let piece = index >> (Self.pieceShift - 6)
        guard piece < pieces.count, setCounts[piece] > 0 else { return 0 }
        if !pieces[piece].isEmpty {
            let within = index & 511
            return within < pieces[piece].count ? pieces[piece][within] : 0
        }
        let rest = count - index << 6
        return rest >= 64 ? ~0 : rest > 0 ? (1 << UInt64(rest)) - 1 : 0
    }

    /// Sets bits of word `index`, none of them past the last one.
    private mutating func merge(_ word: UInt64, into index: Int) {
        let piece = index >> (Self.pieceShift - 6)
        guard word != 0, Int(setCounts[piece]) < width(piece) else { return }
        expand(piece)
        let old = pieces[piece][index & 511]
        pieces[piece][index & 511] = old | word
        settle(piece, Int(setCounts[piece]) + (word & ~old).nonzeroBitCount)
    }
}
