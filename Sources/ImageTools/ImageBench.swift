import BlockCore
import BlockGraph
import BlockIO

/// `bench`: times requests that follow each other through an image.
public struct ImageBench: Sendable {
    public var source: ImageSource
    public var count = 75_000
    public var depth = 64
    public var bufferSize = 4096
    /// From one request to the next; `nil` or 0 for the buffer's size.
    public var step: Int?
    public var offset = 0
    public var writes = false
    public var pattern: UInt8 = 0
    /// Requests between two flushes; 0 for none.
    public var flushInterval = 0
    /// Wait for the requests under way before a flush.
    public var drains = true

    static let memoryBytesMax = 256 << 20

    public init(_ source: ImageSource) {
        self.source = source
    }

    /// What will be done, as it is told before.
    public var heading: String {
        var text =
            "Sending \(count) \(writes ? "write" : "read") requests, \(bufferSize) bytes each, "
            + "\(depth) in parallel (starting at offset \(offset), step size \(stepSize))\n"
        if flushInterval > 0 {
            text += "Sending flush every \(flushInterval) requests\n"
        }
        return text
    }

    private var stepSize: Int { step == 0 ? bufferSize : step ?? bufferSize }

    public func check() throws(BlockError) {
        let limit = Int(Int32.max)
        for (value, name, least) in [
            (count, "count", 0), (depth, "depth", 1), (bufferSize, "buffer size", 1),
            (step ?? 0, "step size", 0), (flushInterval, "flush interval", 0),
        ] where value < least || value > limit {
            throw BlockError(.invalidArgument, "a \(name) of \(value) is out of bounds")
        }
        guard writes || flushInterval == 0 else {
            throw BlockError(.invalidArgument, "--flush-interval is for writes: say -w too")
        }
        guard flushInterval == 0 || flushInterval >= depth else {
            throw BlockError(
                .invalidArgument,
                "a flush every \(flushInterval) requests is more often than \(depth) at the same time "
                    + "allow", remedy: "make --flush-interval at least as large as -d")
        }
        guard drains || flushInterval > 0 else {
            throw BlockError(.invalidArgument, "--no-drain needs --flush-interval")
        }
        guard depth.multiplied(by: bufferSize) ?? .max <= Self.memoryBytesMax else {
            throw BlockError(
                .exhausted,
                "\(depth) buffers of \(bufferSize) bytes are more than \(Self.memoryBytesMax) bytes"
            )
        }
    }

    /// Runs the requests.
    ///
    /// - Parameter announce: told what begins.
    /// - Returns: how long they took, in nanoseconds.
    public func run(
        in session: ToolSession, announce: (String) -> Void
    ) async throws(BlockError) -> UInt64 {
        try check()
        var image = source
        image.isWritable = writes
        let user = try await session.use(
            image, as: "bench",
            Access(
                uses: writes ? [.consistentRead, .write] : .consistentRead,
                shares: image.sharesAll ? .all : [.consistentRead, .writeUnchanged]))
        user.isWriteThrough = source.cache.isWriteThrough
        guard user.size >= bufferSize || count == 0 else {
            throw BlockError(
                .invalidArgument,
                "the image has \(user.size) bytes, fewer than a request of \(bufferSize)")
        }
        announce(heading)
        let round = BenchRound(self, user, step: stepSize)
        let start = session.thread.now
        try await round.run()
        let time = session.thread.now - start
        try await session.graph.detach(user)
        return time
    }

    /// The line at the end.
    public static func result(_ nanoseconds: UInt64) -> String {
        "Run completed in \(ExerciserReport.fixed(Double(nanoseconds) / 1e9, 3)) seconds.\n"
    }
}

/// The requests of one run. Confined to the session's thread.
///
/// Invariant: at a flush with draining no request is under way.
private final class BenchRound: @unchecked Sendable {
    private let bench: ImageBench
    private let user: Edge
    private let step: Int
    private var offset: Int
    private var issued = 0
    private var inFlight = 0
    private let turn = WalkLock()
    private var drained: UnsafeContinuation<Void, Never>?

    init(_ bench: ImageBench, _ user: Edge, step: Int) {
        self.bench = bench
        self.user = user
        self.step = step
        offset = bench.offset
    }

    func run() async throws(BlockError) {
        guard bench.count > 0 else { return }
        wrap()
        let written = try IOVector(allocating: bench.bufferSize)
        written.fill(bench.pattern)
        let workers = min(bench.depth, bench.count)
        try await Workers.run(workers, on: user.node.thread) { () async throws(BlockError) in
            guard let place = try await self.next() else { return false }
            defer { self.leave() }
            if self.bench.writes {
                try await self.user.write(place, from: written)
            } else {
                try await self.user.read(
                    place, into: try IOVector(allocating: self.bench.bufferSize))
            }
            return true
        }
    }

    private func wrap() {
        let room = user.size - bench.bufferSize
        offset = room > 0 ? offset % (room + 1) : 0
    }

    /// The next request's place; flushes first where one is due.
    private func next() async throws(BlockError) -> Int? {
        await turn.lock()
        defer { turn.unlock() }
        guard issued < bench.count else { return nil }
        if bench.flushInterval > 0, issued > 0,
            (bench.count - issued) % bench.flushInterval == 0
        {
            if bench.drains, inFlight > 0 { await withUnsafeContinuation { drained = $0 } }
            try await user.flush()
        }
        issued += 1
        inFlight += 1
        let place = offset
        offset = offset.adding(step) ?? 0
        wrap()
        return place
    }

    private func leave() {
        inFlight -= 1
        if inFlight == 0, let waiting = drained {
            drained = nil
            waiting.resume()
        }
    }
}
