import BlockCore
import BlockGraph
import BlockIO
import NBDProtocol

/// Gathers the replies of a turn and sends them in one call, or, where they are many, ``batchCountMax`` or
/// ``pieceBytes`` at a time, so that the client can begin with the first. Confined to its thread.
///
/// Headers are written into shared memory, a buffer for many; data goes out from where it was read
/// to. What the socket does not take at once is sent by a task, while new replies gather.
final class NBDOutput: EndOfTurnHook, @unchecked Sendable {
    private let seat: IOSeat
    var channel: any NBDChannel
    private var gathered = IOVector()
    private var isScheduled = false
    private var isSending = false
    private var failure: BlockError?
    private let idle = WaitQueue()
    /// Called when bytes left, with how many: the connection's limits follow them.
    var sent: (Int) -> Void = { _ in }

    private var headers: IOBuffer?
    private var headersUsed = 0
    private static let headersCapacity = 16 << 10

    private static let pieceBytes = 32 << 10
    /// Replies that leave together: the connection's to say.
    var batchCountMax = 1
    /// Replies whose end is gathered.
    private var gatheredCount = 0
    /// Bytes queued since ``takeQueuedBytes()``.
    private var queuedBytes = 0

    /// More data than this makes nothing faster: it would wait in memory, beside what the socket holds, and be
    /// out of the processor's cache when it leaves.
    private static let unsentBytesMax = 256 << 10
    /// Bytes that are queued and have not left.
    private var unsentBytes = 0
    private let room = WaitQueue()

    init(_ channel: any NBDChannel, seat: IOSeat) {
        self.channel = channel
        self.seat = seat
    }

    /// Queues a message that `encode` writes into memory of `capacity` bytes, and data behind it.
    ///
    /// - Parameters:
    ///   - isLast: whether it ends its request's reply: of a reply in parts nobody has use for some.
    ///   - encode: returns how many bytes it wrote.
    func append(
        capacity: Int, data: IOVector? = nil, isLast: Bool = true,
        _ encode: (UnsafeMutableRawBufferPointer) -> Int
    ) throws(BlockError) {
        if failure != nil { return }
        let memory = try headerMemory(capacity)
        let count = encode(memory.bytes)
        if memory.buffer === headers { headersUsed = memory.offset + count }
        gathered.append(memory.slice(0, count))
        if let data { gathered.append(data) }
        let added = count + (data?.count ?? 0)
        queuedBytes += added
        unsentBytes += added
        if isLast { gatheredCount += 1 }
        if gathered.count >= Self.pieceBytes || gatheredCount >= batchCountMax {
            push()
        } else {
            schedule()
        }
    }

    /// Whether more is queued than the socket takes.
    var isBehind: Bool { isSending }

    /// Whether nothing leaves any more.
    var isBroken: Bool { failure != nil }

    /// Whether as much is queued as is any good.
    var isFull: Bool { unsentBytes >= Self.unsentBytesMax }

    /// Waits until it is not full any more, which it also is when the client is gone.
    func untilRoom() async {
        while isFull { await room.wait() }
    }

    private func left(_ count: Int) {
        unsentBytes -= count
        sent(count)
        if !isFull { room.wakeAll() }
    }

    func takeQueuedBytes() -> Int {
        defer { queuedBytes = 0 }
        return queuedBytes
    }

    /// Queues bytes.
    func append(_ bytes: [UInt8]) throws(BlockError) {
        if bytes.isEmpty { return }
        try append(capacity: bytes.count) { memory in
            memory.copyBytes(from: bytes)
            return bytes.count
        }
    }

    private func headerMemory(_ capacity: Int) throws(BlockError) -> IOSlice {
        if capacity > Self.headersCapacity / 4 {
            return try IOBuffer(count: capacity).prefix(capacity)
        }
        if let headers, headersUsed + capacity <= headers.capacity {
            return IOSlice(headers, headersUsed, capacity)
        }
        let fresh = try IOBuffer(count: Self.headersCapacity)
        headers = fresh
        headersUsed = 0
        return fresh.prefix(capacity)
    }

    private func schedule() {
        guard !isScheduled, !isSending else { return }
        isScheduled = true
        seat.thread.atEndOfTurn(self)
    }

    func endOfTurn() {
        // The connection moved in this turn.
        guard seat.isCurrent else {
            seat.spawn { self.endOfTurn() }
            return
        }
        isScheduled = false
        push()
        // What was scheduled may have left with a piece, or never will: whoever waits must know.
        if !isSending { idle.wakeAll() }
    }

    private func push() {
        guard !isSending, failure == nil, !gathered.isEmpty else { return }
        let all = takeGathered()
        let now = channel.sendNow(all)
        if let now, now == all.count {
            // The memory of headers is free again when nobody else holds it.
            left(all.count)
            idle.wakeAll()
            return
        }
        let taken = max(now ?? 0, 0)
        if taken > 0 { left(taken) }
        isSending = true
        let rest = all.slice(taken, all.count - taken)
        seat.spawn { await self.sendRest(rest) }
    }

    private func takeGathered() -> IOVector {
        defer {
            gathered = IOVector()
            gatheredCount = 0
        }
        return gathered
    }

    private func sendRest(_ first: IOVector) async {
        var rest = first
        while true {
            do throws(BlockError) {
                try await channel.send(rest)
            } catch {
                failure = error
                // The receiver notices, and ends the connection.
                channel.shutdown()
            }
            left(rest.count)
            if failure != nil {
                left(takeGathered().count)
            }
            if gathered.isEmpty { break }
            rest = takeGathered()
        }
        isSending = false
        idle.wakeAll()
    }

    /// Returns when everything queued has left, or cannot.
    func flush() async {
        if !isSending, !isScheduled { return }
        await idle.wait()
    }
}
