import BlockCore
import BlockGraph
import BlockIO

/// Requests by chance, many at once, through one edge, each checked against a ``ShadowDisk``.
///
/// Confined to the thread of the graph.
public final class RandomRequests: @unchecked Sendable {
    public struct Options: Sendable {
        /// Requests in all.
        public var count = 200
        /// Requests in flight at once.
        public var depth = 8
        public var requestBytesMax = 40_000
        /// Offsets and lengths are multiples of this.
        public var alignment = 1
        public var writes = true
        /// The units of compressed writes, as large as the node's clusters; 0 for no such writes.
        public var compressedUnit = 0
        /// Ask for block status, and hold it to what reads say.
        public var asksStatus = true
        /// What requests may fail with, where errors are injected. A failed write may be there or not.
        public var mayFailWith: Set<BlockError.Code> = []

        public init() {}
    }

    public let edge: Edge
    public let shadow: ShadowDisk
    public let options: Options
    /// What was wrong; nothing, if all is well.
    public private(set) var violations: [String] = []
    /// Requests that failed with what they may fail with.
    public private(set) var failureCounts: [BlockError.Code: Int] = [:]
    private let thread: IOThread
    private var random: SeededRandom
    private var running = 0
    private var sleeper: UnsafeContinuation<Void, Never>?

    /// - Parameter shadow: what the node behind `edge` holds.
    public init(
        _ edge: Edge, _ shadow: ShadowDisk, seed: UInt64, _ options: Options = Options()
    ) {
        precondition(edge.size == shadow.size)
        self.edge = edge
        self.shadow = shadow
        self.options = options
        thread = edge.node.thread
        random = SeededRandom(seed: seed)
    }

    /// Sends all requests and waits for them.
    public func run() async {
        for _ in 0..<options.count {
            await waitUntil(fewerThan: options.depth)
            start()
        }
        await waitUntil(fewerThan: 1)
    }

    /// Reads everything, bit by bit.
    public func verify() async {
        var offset = 0
        while offset < edge.size {
            let range = ByteRange(offset, min(1 << 16, edge.size - offset))
            await attempt("read \(range)") { () throws(BlockError) in try await self.read(range) }
            offset = range.end
        }
    }

    private func waitUntil(fewerThan limit: Int) async {
        while running >= limit {
            await withUnsafeContinuation { sleeper = $0 }
        }
    }

    private func randomRange() -> ByteRange {
        let units = edge.size / options.alignment
        let start = random.below(units)
        let most = min(max(options.requestBytesMax / options.alignment, 1), units - start)
        // Small requests and large ones.
        let count = random.chance(300) ? 1 + random.below(min(most, 4)) : 1 + random.below(most)
        return ByteRange(start * options.alignment, count * options.alignment)
    }

    private func start() {
        let range = randomRange()
        let value = UInt8(random.below(256))
        let flags = random.next()
        let kind = random.below(options.writes ? 16 : 6)
        running += 1
        thread.spawn {
            await self.perform(kind, range, value, flags)
            self.running -= 1
            if let sleeper = self.sleeper {
                self.sleeper = nil
                sleeper.resume()
            }
        }
    }

    private func perform(_ kind: Int, _ range: ByteRange, _ value: UInt8, _ flags: UInt64) async {
        switch kind {
        case 0 where options.asksStatus:
            await attempt("status \(range)") { () throws(BlockError) in
                try await self.status(range)
            }
        case 0..<6:
            await attempt("read \(range)") { () throws(BlockError) in
                try await self.read(range, atOnce: flags & 1 == 0)
            }
        case 6, 7:
            await attempt("zeroes \(range)") { () throws(BlockError) in
                var zeroFlags: WriteFlags = flags & 1 != 0 ? .mayUnmap : []
                if flags & 6 == 0 { zeroFlags.insert(.fua) }
                try await self.change(
                    self.shadow.beginZeroes(range, durable: zeroFlags.contains(.fua))
                ) { () throws(BlockError) in
                    try await self.edge.writeZeroes(range, zeroFlags)
                }
            }
        case 8:
            await attempt("discard \(range)") { () throws(BlockError) in
                try await self.change(self.shadow.beginDiscard(range)) { () throws(BlockError) in
                    try await self.edge.discard(range)
                }
            }
        case 9: await attempt("flush") { () throws(BlockError) in try await self.flush() }
        case 10...12 where options.compressedUnit > 0:
            let whole = units(around: range)
            await attempt("compressed write \(whole)") { () throws(BlockError) in
                try await self.write(whole, value, flags, compressed: true)
            }
        default:
            await attempt("write \(range)") { () throws(BlockError) in
                try await self.write(range, value, flags)
            }
        }
    }

    private func attempt(
        _ name: String, _ body: () async throws(BlockError) -> Void
    ) async {
        do throws(BlockError) {
            try await body()
        } catch {
            if options.mayFailWith.contains(error.code) {
                failureCounts[error.code, default: 0] += 1
            } else {
                violations.append("\(name) failed: \(error)")
            }
        }
    }

    private func change(
        _ request: ShadowDisk.Request, _ body: () async throws(BlockError) -> Void
    ) async throws(BlockError) {
        do throws(BlockError) {
            try await body()
        } catch {
            shadow.end(request, succeeded: false)
            throw error
        }
        shadow.end(request, succeeded: true)
    }

    private func units(around range: ByteRange) -> ByteRange {
        let unit = options.compressedUnit
        return ByteRange(
            from: range.offset / unit * unit,
            to: min((range.end + unit - 1) / unit * unit, edge.size))
    }

    private func write(
        _ range: ByteRange, _ value: UInt8, _ flags: UInt64, compressed: Bool = false
    ) async throws(BlockError) {
        var data = IOVector()
        if flags & 8 == 0, range.count > 1 {
            // Scattered memory of odd lengths.
            let first = 1 + Int(flags >> 32) % (range.count - 1)
            data.append(try IOBuffer(count: first).prefix(first))
            data.append(try IOBuffer(count: range.count - first).prefix(range.count - first))
        } else {
            data = try IOVector(allocating: range.count)
        }
        data.fill(value)
        let isDurable = flags & 7 == 0
        try await change(
            shadow.beginWrite(range, filledWith: value, durable: isDurable)
        ) { () throws(BlockError) in
            var writeFlags: WriteFlags = isDurable ? .fua : []
            if compressed { writeFlags.insert(.compressed) }
            // As exports do: at once where that is possible.
            if writeFlags.isEmpty, flags & 8 != 0, self.edge.writeNow(range.offset, from: data) {
                return
            }
            try await self.edge.write(range.offset, from: data, writeFlags)
        }
    }

    private func read(_ range: ByteRange, atOnce: Bool = false) async throws(BlockError) {
        let data = try IOVector(allocating: range.count)
        // So that what is not filled in shows.
        data.fill(0xa5)
        let request = shadow.beginRead(range)
        do throws(BlockError) {
            if !atOnce || !edge.readNow(range.offset, into: data) {
                try await edge.read(range.offset, into: data)
            }
        } catch {
            shadow.abandonRead(request)
            throw error
        }
        if let wrong = shadow.endRead(request, data.array) { violations.append(wrong) }
    }

    private func flush() async throws(BlockError) {
        let request = shadow.beginFlush()
        do throws(BlockError) {
            try await edge.flush()
        } catch {
            shadow.endFlush(request, succeeded: false)
            throw error
        }
        shadow.endFlush(request, succeeded: true)
    }

    /// Zeroes by block status are zeroes to a read.
    private func status(_ range: ByteRange) async throws(BlockError) {
        let request = shadow.beginRead(range)
        let status: BlockStatus
        do throws(BlockError) {
            status = try await edge.blockStatus(range)
        } catch {
            shadow.abandonRead(request)
            throw error
        }
        let zeroes = status.flags.contains(.zero) ? status.count : 0
        if let wrong = shadow.endStatus(request, zeroes: zeroes) { violations.append(wrong) }
        guard status.count > 0, status.count <= range.count else {
            violations.append("block status of \(range) is about \(status.count) bytes")
            return
        }
    }
}
