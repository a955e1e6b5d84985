import BlockCore

/// The bytes of a simulated file: pages where something was written, holes elsewhere.
struct SparseBytes: Sendable {
    static let pageSize = 4096

    private(set) var size = 0
    /// An empty page is reserved: it takes space and reads as zeroes.
    private var pages: [Int: [UInt8]] = [:]

    var allocatedBytes: Int { pages.count * Self.pageSize }

    /// How many more bytes a write to `range` would take.
    func growth(of range: ByteRange) -> Int {
        if range.isEmpty { return 0 }
        let all = range.offset / Self.pageSize...(range.end - 1) / Self.pageSize
        return all.lazy.filter { pages[$0] == nil }.count * Self.pageSize
    }

    /// Fills `target` from `offset`; what lies past the end is left as it is.
    func read(_ offset: Int, into target: UnsafeMutableRawBufferPointer) {
        Self.forEachPage(ByteRange(offset, min(target.count, max(size - offset, 0)))) {
            page, part, done in
            let slice = UnsafeMutableRawBufferPointer(rebasing: target[done..<(done + part.count)])
            guard let bytes = pages[page], !bytes.isEmpty else {
                slice.initializeMemory(as: UInt8.self, repeating: 0)
                return
            }
            bytes[part].withUnsafeBytes { slice.copyMemory(from: $0) }
        }
    }

    func bytes(_ range: ByteRange) -> [UInt8] {
        var result = [UInt8](repeating: 0, count: range.count)
        result.withUnsafeMutableBytes { read(range.offset, into: $0) }
        return result
    }

    mutating func write(_ offset: Int, _ source: UnsafeRawBufferPointer) {
        if source.isEmpty { return }
        size = max(size, offset + source.count)
        Self.forEachPage(ByteRange(offset, source.count)) { page, part, done in
            if pages[page, default: []].isEmpty {
                pages[page] = [UInt8](repeating: 0, count: Self.pageSize)
            }
            pages[page]?.withUnsafeMutableBytes {
                UnsafeMutableRawBufferPointer(rebasing: $0[part]).copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: source[done..<(done + part.count)]))
            }
        }
    }

    /// Makes `range` read as zeroes. With `reserving` it keeps its space, or gets some.
    mutating func zero(_ range: ByteRange, reserving: Bool) {
        if !reserving, range.count / Self.pageSize > max(pages.count, 2) {
            // A hole much larger than what there is: look at what there is.
            let first = range.offset / Self.pageSize
            let last = range.end / Self.pageSize
            for page in pages.keys where page > first && page < last { pages[page] = nil }
            let head = ByteRange(from: range.offset, to: (first + 1) * Self.pageSize)
            let tail = ByteRange(from: last * Self.pageSize, to: range.end)
            zero(head, reserving: false)
            zero(tail, reserving: false)
            return
        }
        Self.forEachPage(range) { page, part, _ in
            if part.count == Self.pageSize {
                pages[page] = reserving ? [] : nil
            } else if pages[page, default: []].isEmpty {
                if reserving { pages[page] = [] }
            } else {
                pages[page]?.replaceSubrange(part, with: repeatElement(0, count: part.count))
            }
        }
    }

    /// Takes space for `range` without changing what it reads as.
    mutating func reserve(_ range: ByteRange) {
        Self.forEachPage(range) { page, _, _ in
            if pages[page] == nil { pages[page] = [] }
        }
    }

    mutating func setSize(_ newSize: Int) {
        if newSize < size { zero(ByteRange(from: newSize, to: size), reserving: false) }
        size = newSize
    }

    mutating func grow(to end: Int) {
        size = max(size, end)
    }

    /// The first data at or after `offset`.
    func nextData(from offset: Int) -> Int? {
        guard offset < size else { return nil }
        let first = offset / Self.pageSize
        let found = pages.lazy.filter { $0.key >= first && !$0.value.isEmpty }.map(\.key).min()
        guard let found, found * Self.pageSize < size else { return nil }
        return max(offset, found * Self.pageSize)
    }

    /// The first hole at or after `offset`, the end of the file at the latest.
    func nextHole(from offset: Int) -> Int {
        var page = offset / Self.pageSize
        while let bytes = pages[page], !bytes.isEmpty { page += 1 }
        return min(max(offset, page * Self.pageSize), max(size, offset))
    }

    /// Calls `body` with each page of `range`: its number, the part of it, and the bytes before.
    private static func forEachPage(_ range: ByteRange, _ body: (Int, Range<Int>, Int) -> Void) {
        var offset = range.offset
        while offset < range.end {
            let page = offset / pageSize
            let start = offset - page * pageSize
            let count = min(pageSize - start, range.end - offset)
            body(page, start..<(start + count), offset - range.offset)
            offset += count
        }
    }
}
