import BlockCore

/// How often each cluster of an image's file is referred to, counted within a bounded memory.
///
/// ```
/// page    4096 clusters, made when the first of them is referred to
/// single  1 bit a cluster: referred to once, by an entry that says so (COPIED)
/// byte    bits 0–5 count, bit 6: by an entry with COPIED, bit 7: by one without
/// word    bits 0–61 count, bits 62 and 63 as above
/// ```
/// Invariants:
/// 1. Only clusters within `window` have pages. A count outside of it is not known.
/// 2. When pages outgrow the budget, the upper half of them goes and the window ends before them:
///    whoever needs the rest counts again, from there on.
///
/// Pages are plain memory: they are filled a word at a time for long runs, and one image has up to
/// a quarter of a million.
final class QCOW2ReferenceCounts {
    /// What kind of reference is counted.
    enum Reference: UInt64 {
        /// A structure of the image itself, or compressed data: COPIED has no meaning for it.
        case plain = 0
        /// An entry with COPIED: claims to be the only one.
        case copied = 1
        /// An entry without it: should not be the only one.
        case shared = 2
    }

    private struct Page {
        enum Kind: UInt8 { case single, byte, word }
        var kind: Kind
        var memory: UnsafeMutableRawPointer
    }

    static let pageBits = 12
    static let pageCount = 1 << pageBits
    /// Memory for pages, their bookkeeping included.
    static let bytesMax = 96 << 20
    private static let pageOverhead = 96
    /// No image has clusters from here on.
    private static let clusterEnd = QCOW2.Limit.hostOffsetMax >> QCOW2.Limit.clusterBitsMin

    private let budget: Int
    /// Cluster numbers.
    private(set) var window: Range<Int>
    private var pages: [Int: Page] = [:]
    private var bytes = 0
    /// Numbers of pages, in order; made anew when pages have come or gone.
    private var sorted: [Int] = []
    private var lastNumber = -1
    private var lastPage: Page?
    /// The highest cluster that was referred to, inside the window or not; -1 for none.
    private(set) var highest = -1

    init(from first: Int, budget: Int = QCOW2ReferenceCounts.bytesMax) {
        precondition(first & (Self.pageCount - 1) == 0)
        window = first..<Self.clusterEnd
        self.budget = budget
    }

    /// No window follows.
    var isLast: Bool { window.upperBound == Self.clusterEnd }

    deinit {
        for page in pages.values { page.memory.deallocate() }
    }

    // MARK: Counting

    /// Counts `times` references to each of `count` clusters from `first` on.
    func add(_ first: Int, _ count: Int, _ reference: Reference, times: Int = 1) {
        if count <= 0 { return }
        highest = max(highest, first + count - 1)
        var cluster = max(first, window.lowerBound)
        let end = first + count
        while cluster < min(end, window.upperBound) {
            let number = cluster >> Self.pageBits
            let pageEnd = (number + 1) << Self.pageBits
            let range = cluster..<min(end, pageEnd)
            addWithin(number, range, reference, times)
            cluster = pageEnd
        }
    }

    private func addWithin(
        _ number: Int, _ range: Range<Int>, _ reference: Reference, _ times: Int
    ) {
        let isSingle = reference == .copied && times == 1
        guard var page = page(number, isSingle ? .single : .byte) else { return }
        let first = range.lowerBound & (Self.pageCount - 1)
        let end = first + range.count
        if page.kind == .single {
            if isSingle, Self.setBits(page.memory, first, end) { return }
            guard widen(number, &page, to: .byte) else { return }
        }
        let flag = reference.rawValue
        for index in first..<end {
            if page.kind == .byte {
                let old = page.memory.load(fromByteOffset: index, as: UInt8.self)
                let count = Int(old & 0x3f) + times
                if count <= 0x3f {
                    let new = old & 0xc0 | UInt8(count) | UInt8(flag << 6)
                    page.memory.storeBytes(of: new, toByteOffset: index, as: UInt8.self)
                    continue
                }
                guard widen(number, &page, to: .word) else { return }
            }
            let words = page.memory.assumingMemoryBound(to: UInt64.self)
            words[index] = (words[index] &+ UInt64(times)) | flag << 62
        }
    }

    /// Sets bits of a single page, if all of them are clear.
    ///
    /// - Returns: whether they were; else nothing has changed.
    private static func setBits(_ memory: UnsafeMutableRawPointer, _ first: Int, _ end: Int) -> Bool
    {
        let words = memory.assumingMemoryBound(to: UInt64.self)
        func forEach(_ body: (Int, UInt64) -> Bool) -> Bool {
            var index = first
            while index < end {
                let next = min(end, (index >> 6 + 1) << 6)
                let width = UInt64(next - index)
                let mask: UInt64 = width == 64 ? ~0 : ((1 << width) - 1) << UInt64(index & 63)
                if !body(index >> 6, mask) { return false }
                index = next
            }
            return true
        }
        guard forEach({ words[$0] & $1 == 0 }) else { return false }
        return forEach { word, mask in
            words[word] |= mask
            return true
        }
    }

    // MARK: Pages

    private static func size(_ kind: Page.Kind) -> Int {
        switch kind {
        case .single: pageCount / 8
        case .byte: pageCount
        case .word: pageCount * 8
        }
    }

    private static func makePage(_ kind: Page.Kind) -> Page {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: size(kind), alignment: 8)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: size(kind))
        return Page(kind: kind, memory: memory)
    }

    /// The page, made when it is not there; `nil` when the window ends before it now.
    private func page(_ number: Int, _ kind: Page.Kind) -> Page? {
        if number == lastNumber, let lastPage { return lastPage }
        var found = pages[number]
        if found == nil {
            let made = Self.makePage(kind)
            pages[number] = made
            found = made
            grow(by: Self.size(kind) + Self.pageOverhead)
            if number << Self.pageBits >= window.upperBound { return nil }
        }
        lastNumber = number
        lastPage = found
        return found
    }

    /// - Returns: whether the page is still there: memory may have run out.
    private func widen(_ number: Int, _ page: inout Page, to kind: Page.Kind) -> Bool {
        let wider = Self.makePage(kind)
        for index in 0..<Self.pageCount {
            let value = Self.value(page, index)
            if value == 0 { continue }
            if kind == .byte {
                let byte = UInt8(value & 0x3f) | UInt8(value >> 62) << 6
                wider.memory.storeBytes(of: byte, toByteOffset: index, as: UInt8.self)
            } else {
                wider.memory.assumingMemoryBound(to: UInt64.self)[index] = value
            }
        }
        page.memory.deallocate()
        let added = Self.size(kind) - Self.size(page.kind)
        page = wider
        pages[number] = wider
        lastNumber = number
        lastPage = wider
        grow(by: added)
        return pages[number] != nil
    }

    /// Invariant 2.
    private func grow(by count: Int) {
        bytes += count
        guard bytes > budget, pages.count > 1 else { return }
        let numbers = pages.keys.sorted()
        for number in numbers[(numbers.count / 2)...] {
            guard let page = pages.removeValue(forKey: number) else { continue }
            bytes -= Self.size(page.kind) + Self.pageOverhead
            page.memory.deallocate()
        }
        sorted = []
        window = window.lowerBound..<(numbers[numbers.count / 2] << Self.pageBits)
        lastNumber = -1
        lastPage = nil
    }

    // MARK: Reading

    /// Count in the low 62 bits, flags above: the form of a word page.
    private static func value(_ page: Page, _ index: Int) -> UInt64 {
        switch page.kind {
        case .single:
            let word = page.memory.load(fromByteOffset: (index >> 6) * 8, as: UInt64.self)
            return (word >> UInt64(index & 63)) & 1 == 0 ? 0 : 1 | Reference.copied.rawValue << 62
        case .byte:
            let byte = page.memory.load(fromByteOffset: index, as: UInt8.self)
            return UInt64(byte & 0x3f) | UInt64(byte >> 6) << 62
        case .word:
            return page.memory.load(fromByteOffset: index << 3, as: UInt64.self)
        }
    }

    private func value(of cluster: Int) -> UInt64 {
        let number = cluster >> Self.pageBits
        if number == lastNumber, let lastPage {
            return Self.value(lastPage, cluster & (Self.pageCount - 1))
        }
        guard let page = pages[number] else { return 0 }
        lastNumber = number
        lastPage = page
        return Self.value(page, cluster & (Self.pageCount - 1))
    }

    /// The references to a cluster within the window.
    func count(of cluster: Int) -> UInt64 { value(of: cluster) & ~(3 << 62) }

    /// Whether an entry's COPIED flag contradicts the count: one without it is alone, or one with it
    /// is not.
    func hasWrongFlag(_ cluster: Int) -> Bool {
        let value = value(of: cluster)
        let count = value & ~(3 << 62)
        if count == 1 { return value >> 63 != 0 }
        return count > 1 && value >> 62 & 1 != 0
    }

    /// Whether some cluster within the window has an entry with a wrong COPIED flag.
    var hasWrongFlags: Bool {
        for (number, page) in pages where page.kind != .single {
            for index in 0..<Self.pageCount where hasWrongFlag(number << Self.pageBits + index) {
                return true
            }
        }
        return false
    }

    /// Whether a count within `range` is not 0.
    func isUsed(_ range: Range<Int>) -> Bool { firstUsed(in: range) != nil }

    /// The first cluster in `range` that is referred to. Pages that are not there cost nothing.
    func firstUsed(in range: Range<Int>) -> Int? {
        var cluster = range.lowerBound
        while cluster < range.upperBound {
            let number = cluster >> Self.pageBits
            guard pages[number] != nil else {
                guard let next = nextPage(after: number) else { return nil }
                cluster = next << Self.pageBits
                continue
            }
            let end = min(range.upperBound, (number + 1) << Self.pageBits)
            while cluster < end {
                if count(of: cluster) != 0 { return cluster }
                cluster += 1
            }
        }
        return nil
    }

    private func nextPage(after number: Int) -> Int? {
        if sorted.count != pages.count { sorted = pages.keys.sorted() }
        var low = 0
        var high = sorted.count
        while low < high {
            let middle = (low + high) / 2
            if sorted[middle] <= number { low = middle + 1 } else { high = middle }
        }
        return low < sorted.count ? sorted[low] : nil
    }

    /// The numbers of blocks of `1 << bits` clusters that have one that is referred to.
    func blocksInUse(_ bits: Int) -> Set<Int> {
        var result = Set<Int>()
        for (number, page) in pages {
            // A page is made for a cluster that is referred to.
            if bits >= Self.pageBits {
                result.insert(number >> (bits - Self.pageBits))
                continue
            }
            let first = number << Self.pageBits
            for index in 0..<Self.pageCount where Self.value(page, index) != 0 {
                result.insert((first + index) >> bits)
            }
        }
        return result
    }
}
