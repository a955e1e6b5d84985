import BlockCore
import BlockGraph
import BlockIO
import QMP
import Synchronization

/// `throttle-group`: limits that several nodes share. Confined to where its seat stands: with its nodes, all
/// of which are on one thread.
///
///     member a ─▶ reads ▒▒      one request after the other, taken from the members in turn:
///     member b ─▶ reads ▒   ──▶ a member with many requests waits no less than one with few
///     member a ─▶ writes ▒▒▒ ──▶ the same for writes, which wait for reads only by limits of both
///
/// Invariants:
/// 1. A request goes at once only while none of its direction waits, and its buckets are not over
///    their brims; every other waits in its member's queue.
/// 2. While requests of a direction wait, exactly one task serves them (`isServing`).
/// 3. Requests of a member that is drained do not wait; they count all the same.
public final class ThrottleGroup: GraphObject, @unchecked Sendable {
    enum Direction: Int, CaseIterable { case read, write }

    public let identifier: String
    /// Where its nodes are; without any it goes where its first one comes.
    public let seat: IOSeat
    private var thread: IOThread { seat.thread }
    /// Its nodes, for whoever asks from another thread.
    private let names = Mutex<[String]>([])
    public private(set) var limits: ThrottleLimits
    private var buckets: [ThrottleBucket]
    private var leakedAt: UInt64
    /// In the order of their turn, for each direction: who was served goes to the end.
    private var turns: [[ThrottleMember]] = [[], []]
    private var isServing = [false, false]
    private var timers: [IOTimer?] = [nil, nil]

    /// - Throws: `invalidArgument` for limits that contradict each other.
    public init(
        _ identifier: String, _ limits: ThrottleLimits = ThrottleLimits(), on thread: IOThread
    ) throws(BlockError) {
        try limits.validate()
        self.identifier = identifier
        seat = IOSeat(on: thread)
        self.limits = limits
        buckets = Self.buckets(limits)
        leakedAt = thread.now
    }

    /// Reads the properties of `object-add`: `limits`, and one by one with `x-` in front.
    public static func properties(_ reader: OptionReader) throws(BlockError) -> ThrottleLimits {
        var limits = ThrottleLimits()
        if let given = try reader.object("limits") {
            try limits.take(given)
            try given.finish()
        }
        try limits.take(reader, prefix: "x-")
        try reader.finish()
        return limits
    }

    /// Puts other limits into force, for requests that wait too.
    ///
    /// - Throws: `invalidArgument` for limits that contradict each other; the old ones stay then.
    public func setLimits(_ limits: ThrottleLimits) throws(BlockError) {
        try limits.validate()
        self.limits = limits
        buckets = Self.buckets(limits)
        leakedAt = thread.now
        for timer in timers { timer?.cancel() }
    }

    private static func buckets(_ limits: ThrottleLimits) -> [ThrottleBucket] {
        ThrottleLimits.Kind.allCases.map { ThrottleBucket(limits[$0]) }
    }

    public var users: [String] { names.withLock { $0.map { "node '\($0)'" } } }

    // MARK: Members

    /// - Throws: `busy` when it has nodes on another thread.
    func add(_ member: ThrottleMember, on thread: IOThread) throws(BlockError) {
        let isFree = names.withLock { names in
            // Without nodes nothing runs here, wherever the seat stands.
            let isFree = names.isEmpty || seat.thread === thread
            if isFree { names.append(member.name) }
            return isFree
        }
        guard isFree else {
            throw BlockError(
                .busy,
                "throttle group '\(identifier)' holds back \(users.joined(separator: ", ")) on another "
                    + "I/O thread",
                remedy: "use a group of its own, or move the nodes to one thread first",
                node: member.name)
        }
        if seat.thread !== thread { seat.take(to: thread) }
        for direction in Direction.allCases { turns[direction.rawValue].append(member) }
    }

    /// Its requests go on without waiting.
    func remove(_ member: ThrottleMember) {
        release(member)
        for direction in Direction.allCases {
            turns[direction.rawValue].removeAll { $0 === member }
        }
        names.withLock { names in
            if let place = names.firstIndex(of: member.name) { names.remove(at: place) }
        }
    }

    /// - Throws: `busy` when it has nodes that are not among `nodes`.
    func checkMove(with nodes: [BlockNode]) throws(BlockError) {
        for member in turns[0] where !nodes.contains(where: { $0.name == member.name }) {
            throw BlockError(
                .busy,
                "throttle group '\(identifier)' holds back node '\(member.name)' too, which stays")
        }
    }

    /// Lets all that waits of a member go.
    func release(_ member: ThrottleMember) {
        for direction in Direction.allCases {
            let waiting = member.queues[direction.rawValue]
            member.queues[direction.rawValue] = []
            for request in waiting {
                count(direction, request.bytes)
                request.continuation.resume()
            }
            // Whoever serves looks again: perhaps nobody is left.
            timers[direction.rawValue]?.cancel()
        }
    }

    // MARK: Requests

    /// Returns when a request of `bytes` may go.
    func admit(_ member: ThrottleMember, _ direction: Direction, bytes: Int) async {
        let place = direction.rawValue
        if member.isDrained || !isServing[place] && waitNanoseconds(direction) == 0 {
            count(direction, bytes)
            return
        }
        await withUnsafeContinuation { continuation in
            member.queues[place].append(.init(bytes: bytes, continuation: continuation))
            guard !isServing[place] else { return }
            isServing[place] = true
            seat.spawn { await self.serve(direction) }
        }
    }

    private func serve(_ direction: Direction) async {
        let place = direction.rawValue
        while let turn = turns[place].firstIndex(where: { !$0.queues[place].isEmpty }) {
            let wait = waitNanoseconds(direction)
            guard wait == 0 else {
                let timer = IOTimer(on: seat)
                timers[place] = timer
                _ = await timer.wait(nanoseconds: wait)
                timers[place] = nil
                continue
            }
            let member = turns[place].remove(at: turn)
            turns[place].append(member)
            let request = member.queues[place].removeFirst()
            count(direction, request.bytes)
            request.continuation.resume()
        }
        isServing[place] = false
    }

    // MARK: Buckets

    /// What a request of each direction is counted in.
    private static let kinds: [[ThrottleLimits.Kind]] = [
        [.operationsTotal, .operationsRead, .bytesTotal, .bytesRead],
        [.operationsTotal, .operationsWrite, .bytesTotal, .bytesWrite],
    ]

    private func waitNanoseconds(_ direction: Direction) -> UInt64 {
        let now = thread.now
        let seconds = Double(now &- leakedAt) / 1e9
        leakedAt = now
        for index in buckets.indices { buckets[index].leak(seconds: seconds) }
        var wait: UInt64 = 0
        for kind in Self.kinds[direction.rawValue] {
            wait = max(wait, buckets[kind.rawValue].waitNanoseconds)
        }
        return wait
    }

    private func count(_ direction: Direction, _ bytes: Int) {
        let size = limits.operationBytes
        let operations = size > 0 && bytes > size ? Double(bytes) / Double(size) : 1
        for kind in Self.kinds[direction.rawValue] {
            switch kind {
            case .operationsTotal, .operationsRead, .operationsWrite:
                buckets[kind.rawValue].pour(operations)
            case .bytesTotal, .bytesRead, .bytesWrite: buckets[kind.rawValue].pour(Double(bytes))
            }
        }
    }
}

/// A node of a throttle group, with its requests that wait.
final class ThrottleMember {
    struct Request {
        let bytes: Int
        let continuation: UnsafeContinuation<Void, Never>
    }

    let name: String
    /// By direction, the oldest first.
    var queues: [[Request]] = [[], []]
    private var drainCount = 0

    var isDrained: Bool { drainCount > 0 }

    init(_ name: String) {
        self.name = name
    }

    func beginDrain() { drainCount += 1 }
    func endDrain() { drainCount -= 1 }
}
