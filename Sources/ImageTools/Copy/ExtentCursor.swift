import BlockCore

/// A part of the source that one worker takes.
struct CopyItem: Sendable {
    /// Counts from 0: the order in the source.
    let index: Int
    let range: ByteRange
    let kind: CopyKind
}

/// Walks the source's extents, cutting them into items. Confined to the session's thread.
///
/// Invariant: items follow each other without gaps and begin on a multiple of `unit`. Where the extents
/// are finer than that, an item of data covers them.
final class ExtentCursor: @unchecked Sendable {
    private let source: CopySource
    private let unit: Int
    /// The longest item of data; a multiple of `unit`.
    private let dataMax: Int
    private let end: Int
    private var offset: Int
    private var index = 0
    /// What is known from some offset on.
    private var known: (kind: CopyKind, range: ByteRange)?
    /// One worker walks at a time.
    private let walk = WalkLock()
    /// Bytes of which status says nothing but an error are taken for data.
    private let salvages: Bool

    init(
        _ source: CopySource, range: ByteRange? = nil, unit: Int = 1, dataMax: Int,
        salvages: Bool = false
    ) {
        let range = range ?? ByteRange(0, source.size)
        self.source = source
        self.unit = unit
        self.dataMax = dataMax
        self.salvages = salvages
        offset = range.offset
        end = range.end
    }

    /// The next item; `nil` at the end.
    func next() async throws(BlockError) -> CopyItem? {
        await walk.lock()
        defer { walk.unlock() }
        guard offset < end else { return nil }
        let (kind, itemEnd) = try await extent()
        let item = CopyItem(index: index, range: ByteRange(from: offset, to: itemEnd), kind: kind)
        index += 1
        offset = itemEnd
        return item
    }

    private func extent() async throws(BlockError) -> (kind: CopyKind, end: Int) {
        let first = try await run(at: offset)
        if first.kind != .data {
            let last = try await joined(first.kind, first.end)
            let whole = last == end ? end : last.roundedDown(to: unit)
            if whole > offset { return (first.kind, whole) }
        }
        return (.data, try await dataEnd())
    }

    /// Where the run of `kind` ends that goes on at `start`.
    private func joined(_ kind: CopyKind, _ start: Int) async throws(BlockError) -> Int {
        var stop = start
        while stop < end {
            let next = try await run(at: stop)
            if next.kind != kind { break }
            stop = next.end
        }
        return stop
    }

    /// Where the item of data at `offset` ends: with the data, rounded up to whole units.
    private func dataEnd() async throws(BlockError) -> Int {
        let limit = min(end, offset.adding(dataMax) ?? end)
        var stop = offset
        while stop < limit {
            let next = try await run(at: stop)
            if next.kind == .data {
                stop = min(next.end, limit)
            } else if stop == offset || !stop.isAligned(to: unit) {
                stop = min((stop + 1).roundedUp(to: unit) ?? limit, limit)
            } else {
                break
            }
        }
        return stop
    }

    private func run(at start: Int) async throws(BlockError) -> (kind: CopyKind, end: Int) {
        if let known, known.range.offset <= start, start < known.range.end {
            return (known.kind, known.range.end)
        }
        let found: (kind: CopyKind, count: Int)
        do throws(BlockError) {
            found = try await source.status(ByteRange(from: start, to: end))
        } catch {
            guard salvages else { throw error }
            // Reading will tell what is there.
            found = (.data, min(end - start, dataMax))
        }
        known = (found.kind, ByteRange(start, found.count))
        return (found.kind, start + found.count)
    }
}
