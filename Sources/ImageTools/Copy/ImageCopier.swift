import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols

/// Copies extents from a source to a target, several at a time.
///
/// ```
/// cursor ──► item ──► worker: read ──► turnstile ──► write, without the zeroes
///                     worker: read ──►   …            (m workers, a buffer each)
/// ```
/// Invariants:
/// 1. No more than `workerCount` buffers of `itemBytesMax` exist.
/// 2. In order (without `outOfOrder`), a write begins only after all writes of items before it began.
/// 3. Known zeroes and what is `below` are never read.
///
/// Confined to the session's thread.
final class ImageCopier: @unchecked Sendable {
    struct Settings: Sendable {
        var workerCount = 8
        var outOfOrder = false
        /// Bytes a second; 0 for no limit.
        var rate = 0
        /// What cannot be read becomes zeroes.
        var salvages = false
        /// Have the storage copy, with this method first.
        var offload: CopyMethod?
        /// Items begin and end on multiples of this.
        var unit = 1
        /// What is copied; `nil` for all.
        var range: ByteRange?
        /// After so many bytes of data what is copied leaves nothing behind in the page cache.
        var streamsAfterBytes = PageCache.fairShareBytes
        /// Told of what was lost in salvaging.
        var warn: @Sendable (String) -> Void = { _ in }
    }

    static let itemBytesMax = 2 << 20
    /// In pieces of this the place of a failure is looked for.
    private static let searchBytes = 64 << 10
    /// Where the storage copies, nothing is held in memory.
    private static let offloadBytesMax = 64 << 20

    private let source: CopySource
    private let target: CopyTarget
    private let settings: Settings
    private let cursor: ExtentCursor
    private let turnstile = Turnstile()
    private let progress: Progress
    private let limit: RateLimit?
    private let thread: IOThread
    /// The method that is still worth trying.
    private var offload: CopyMethod?
    private var offloadHasWorked = false
    private var dataBytes = 0

    init(
        from source: CopySource, to target: CopyTarget, _ settings: Settings, _ progress: Progress
    ) {
        self.source = source
        self.target = target
        self.settings = settings
        self.progress = progress
        thread = target.edge.node.thread
        offload = settings.offload
        limit = RateLimit(settings.rate, on: thread)
        cursor = ExtentCursor(
            source, range: settings.range, unit: settings.unit,
            dataMax: settings.offload == .copy ? Self.offloadBytesMax : Self.itemBytesMax,
            salvages: settings.salvages)
    }

    /// Copies everything.
    ///
    /// - Throws: the first failure, with no request in flight any more.
    func run() async throws(BlockError) {
        try await Workers.run(settings.workerCount, on: thread) { () async throws(BlockError) in
            guard let item = try await self.cursor.next() else { return false }
            try await self.copy(item)
            self.progress.advance(item.range.count)
            return true
        }
    }

    private func copy(_ item: CopyItem) async throws(BlockError) {
        switch item.kind {
        case .below:
            turnstile.pass(item.index)
        case .zero:
            await takeTurn(item)
            try await target.zero(item.range)
        case .data:
            countData(item.range.count)
            var hasTurn = false
            do throws(BlockError) {
                await limit?.admit(item.range.count)
                if offload != nil, let place = source.place(of: item.range) {
                    await takeTurn(item)
                    hasTurn = true
                    if try await offloaded(item, place.edge, place.range) { return }
                }
                try await copyData(item, &hasTurn)
            } catch {
                if !hasTurn { turnstile.pass(item.index) }
                throw error
            }
        }
    }

    /// Reads and writes an item in pieces that a buffer holds.
    private func copyData(_ item: CopyItem, _ hasTurn: inout Bool) async throws(BlockError) {
        var offset = item.range.offset
        while offset < item.range.end {
            let piece = ByteRange(offset, min(Self.itemBytesMax, item.range.end - offset))
            let vector = try IOVector(allocating: piece.count)
            try await read(piece, into: vector)
            if !hasTurn {
                await takeTurn(item)
                hasTurn = true
            }
            try await target.write(piece, from: vector)
            offset = piece.end
        }
    }

    /// Waits for the item's turn; the next one's comes as soon as this one suspends.
    private func takeTurn(_ item: CopyItem) async {
        if !settings.outOfOrder { await turnstile.wait(for: item.index) }
        turnstile.pass(item.index)
    }

    /// A short copy may well be used next; a long one pushes everybody else's data out of the cache.
    private func countData(_ count: Int) {
        let before = dataBytes
        dataBytes = dataBytes.adding(count) ?? .max
        guard before < settings.streamsAfterBytes, dataBytes >= settings.streamsAfterBytes else {
            return
        }
        for edge in source.edges + [target.edge] { edge.node.streamFiles() }
    }

    // MARK: Offload

    /// - Returns: `false` when the item has to be read and written.
    private func offloaded(
        _ item: CopyItem, _ edge: Edge, _ range: ByteRange
    ) async throws(BlockError) -> Bool {
        guard let method = offload else { return false }
        do throws(BlockError) {
            try await target.edge.copyRange(from: edge, range, to: item.range.offset, method)
            offloadHasWorked = true
            return true
        } catch  where error.code == .unsupported {
            // Odd ends may be refused where the rest is not.
            if !offloadHasWorked { offload = nil }
            return false
        }
    }

    // MARK: Reading

    private func read(_ range: ByteRange, into vector: IOVector) async throws(BlockError) {
        do throws(BlockError) {
            try await source.read(range.offset, into: vector)
        } catch {
            guard settings.salvages else {
                let offset = await failingOffset(range, into: vector)
                throw error.doing("error while reading at offset \(offset)")
            }
            await salvage(range, into: vector)
        }
    }

    /// Where in a range that could not be read the first sector is that cannot; its beginning when all
    /// can by themselves.
    private func failingOffset(_ range: ByteRange, into vector: IOVector) async -> Int {
        var offset = range.offset
        var unit = Self.searchBytes
        while offset < range.end {
            let count = min(unit, range.end - offset)
            let part = vector.slice(offset - range.offset, count)
            do throws(BlockError) {
                try await source.read(offset, into: part)
                offset += count
            } catch {
                if unit == 512 { return offset }
                unit = 512
            }
        }
        return range.offset
    }

    /// Reads sector by sector; zeroes where that fails.
    private func salvage(_ range: ByteRange, into vector: IOVector) async {
        var offset = range.offset
        while offset < range.end {
            let count = min(512, range.end - offset)
            let part = vector.slice(offset - range.offset, count)
            do throws(BlockError) {
                try await source.read(offset, into: part)
            } catch {
                part.fill(0)
                settings.warn("error while reading offset \(offset): \(error.message)")
            }
            offset += count
        }
    }
}

extension BlockNode {
    /// Has the files below leave nothing behind in the page cache.
    fileprivate func streamFiles() {
        var rest = [self]
        while let node = rest.popLast() {
            (node.driver as? FileDriver)?.isStreaming = true
            rest.append(contentsOf: node.children.map(\.node))
        }
    }
}
