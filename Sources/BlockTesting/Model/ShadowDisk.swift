import BlockCore

/// What a disk may hold, byte by byte, while requests are in flight, and after a crash.
///
/// For each byte it knows the set of values that a read may return now, and the set that may be found
/// after a crash. Tell it when each request begins and how it ended; ask it whether what was read is
/// legal.
///
/// Rules:
/// 1. While a write, zeroing or discard is in flight, its bytes are as before or as written. Once it
///    succeeded they are as written; once it failed, either.
/// 2. Of requests in flight at the same time on the same bytes, any may be the last.
/// 3. What a read returned when nothing was changing is what the byte holds from then on.
/// 4. A successful flush makes durable what was finished when it began. A durable (FUA) write is
///    durable when it has succeeded. After a crash, bytes hold what was durable, or what was written
///    since, in any mixture.
/// 5. A discarded byte is as before or zero, until it is read or written.
///
/// Not safe for several threads at once: it belongs to the thread of the graph that is tested.
public final class ShadowDisk {
    /// Names a request in flight.
    public struct Request: Hashable, Sendable {
        fileprivate let identifier: UInt64
    }

    /// What a change writes.
    private enum Content {
        case bytes([UInt8])
        case value(UInt8)
        /// As before, or zero.
        case discard

        func value(at index: Int) -> UInt8 {
            switch self {
            case .bytes(let bytes): bytes[index]
            case .value(let value): value
            case .discard: 0
            }
        }
    }

    private final class Change {
        let range: ByteRange
        let content: Content
        let isDurable: Bool
        /// Changes of the same bytes that were in flight when this one was.
        var concurrent: [Change] = []

        init(_ range: ByteRange, _ content: Content, _ isDurable: Bool) {
            self.range = range
            self.content = content
            self.isDurable = isDurable
        }
    }

    /// A read or flush: what was legal at its beginning, and what came since.
    private final class Observation {
        let range: ByteRange
        let start: [UInt16]
        var began: [Change] = []
        /// Nothing changed its bytes while it ran.
        var isQuiet: Bool

        init(_ range: ByteRange, _ start: [UInt16], isQuiet: Bool) {
            self.range = range
            self.start = start
            self.isQuiet = isQuiet
        }
    }

    public let size: Int
    /// Per byte: below 256 the value; above, a set of values.
    private var current: [UInt16]
    private var durable: [UInt16]
    private var sets: [ByteSet] = []
    private var numbers: [ByteSet: UInt16] = [:]

    // In the order in which they began.
    private var changes: [(Request, Change)] = []
    private var observations: [(Request, Observation)] = []
    private var lastIdentifier: UInt64 = 0

    /// A disk that holds `value` everywhere, on stable storage.
    public init(size: Int, value: UInt8 = 0) {
        self.size = size
        current = [UInt16](repeating: UInt16(value), count: size)
        durable = current
    }

    /// A disk that holds `bytes`, on stable storage.
    public init(bytes: [UInt8]) {
        size = bytes.count
        current = bytes.map { UInt16($0) }
        durable = current
    }

    // MARK: Sets of values

    private func set(_ number: UInt16) -> ByteSet {
        number < 256 ? ByteSet(UInt8(number)) : sets[Int(number) - 256]
    }

    private func number(of set: ByteSet) -> UInt16 {
        if let value = set.single { return UInt16(value) }
        if let number = numbers[set] { return number }
        precondition(sets.count < 65_000, "too many sets of legal values")
        let number = UInt16(sets.count + 256)
        sets.append(set)
        numbers[set] = number
        return number
    }

    /// `change(index, number)` for each byte of `range`, remembering the last answer: runs of bytes
    /// are mostly alike.
    private func update(
        _ states: inout [UInt16], _ range: ByteRange, _ key: (Int) -> UInt16,
        _ change: (Int, ByteSet) -> ByteSet
    ) {
        var last: (state: UInt16, key: UInt16, result: UInt16)?
        for index in range.offset..<range.end {
            let state = states[index]
            let key = key(index)
            if let last, last.state == state, last.key == key {
                states[index] = last.result
                continue
            }
            let result = number(of: change(index, set(state)))
            last = (state, key, result)
            states[index] = result
        }
    }

    // MARK: Changes

    public func beginWrite(
        _ offset: Int, _ bytes: [UInt8], durable: Bool = false
    ) -> Request {
        begin(Change(ByteRange(offset, bytes.count), .bytes(bytes), durable))
    }

    public func beginWrite(
        _ range: ByteRange, filledWith value: UInt8, durable: Bool = false
    ) -> Request {
        begin(Change(range, .value(value), durable))
    }

    public func beginZeroes(_ range: ByteRange, durable: Bool = false) -> Request {
        begin(Change(range, .value(0), durable))
    }

    public func beginDiscard(_ range: ByteRange) -> Request {
        begin(Change(range, .discard, false))
    }

    private func begin(_ change: Change) -> Request {
        let range = change.range
        precondition(range.end <= size)
        for (_, other) in changes where other.range.overlaps(range) {
            other.concurrent.append(change)
            change.concurrent.append(other)
        }
        for (_, observation) in observations where observation.range.overlaps(range) {
            observation.began.append(change)
            observation.isQuiet = false
        }
        let value = { (index: Int) in
            change.content.value(at: index - range.offset)
        }
        let add = { (index: Int, set: ByteSet) in set.union(ByteSet(value(index))) }
        update(&current, range, { UInt16(value($0)) }, add)
        update(&durable, range, { UInt16(value($0)) }, add)
        let request = nextRequest()
        changes.append((request, change))
        return request
    }

    /// The change ended. After a failure its bytes may be as before or as written.
    public func end(_ request: Request, succeeded: Bool) {
        guard let index = changes.firstIndex(where: { $0.0 == request }) else {
            preconditionFailure("the request is no change in flight")
        }
        let change = changes.remove(at: index).1
        guard succeeded else { return }
        if case .discard = change.content { return }
        // Anything before it is gone; what ran beside it may have come after it.
        restrict(&current, change)
        if change.isDurable { restrict(&durable, change) }
    }

    private func restrict(_ states: inout [UInt16], _ change: Change) {
        let start = change.range.offset
        if change.concurrent.isEmpty {
            for index in start..<change.range.end {
                states[index] = UInt16(change.content.value(at: index - start))
            }
            return
        }
        for index in start..<change.range.end {
            var legal = ByteSet(change.content.value(at: index - start))
            for other in change.concurrent
            where index >= other.range.offset && index < other.range.end {
                // A discard that came after leaves the byte, or zeroes it.
                legal.insert(other.content.value(at: index - other.range.offset))
            }
            states[index] = number(of: set(states[index]).intersection(legal))
        }
    }

    private func nextRequest() -> Request {
        lastIdentifier += 1
        return Request(identifier: lastIdentifier)
    }

    // MARK: Reads

    public func beginRead(_ range: ByteRange) -> Request {
        observe(range)
    }

    private func observe(_ range: ByteRange) -> Request {
        precondition(range.end <= size)
        let request = nextRequest()
        observations.append(
            (
                request,
                Observation(
                    range, Array(current[range.offset..<range.end]),
                    isQuiet: !changes.contains { $0.1.range.overlaps(range) })
            ))
        return request
    }

    private func endObservation(_ request: Request) -> Observation {
        guard let index = observations.firstIndex(where: { $0.0 == request }) else {
            preconditionFailure("the request is no read or flush in flight")
        }
        return observations.remove(at: index).1
    }

    /// The read failed, or what it returned does not matter.
    public func abandonRead(_ request: Request) {
        _ = endObservation(request)
    }

    /// The read returned `bytes`.
    ///
    /// - Returns: what is wrong with them, or `nil`.
    public func endRead(_ request: Request, _ bytes: [UInt8]) -> String? {
        let observation = endObservation(request)
        let start = observation.range.offset
        guard bytes.count == observation.range.count else {
            return "a read of \(observation.range) returned \(bytes.count) bytes"
        }
        if let wrong = check(observation, bytes.count, { bytes[$0] }) {
            return "\(wrong) (in a read of \(observation.range))"
        }
        if observation.isQuiet {
            for index in bytes.indices { current[start + index] = UInt16(bytes[index]) }
        }
        return nil
    }

    /// A question that began as a read was answered: the first `count` bytes read as zeroes.
    ///
    /// - Returns: what is wrong with that, or `nil`.
    public func endStatus(_ request: Request, zeroes count: Int) -> String? {
        let observation = endObservation(request)
        return check(observation, min(count, observation.range.count)) { _ in 0 }
            .map { "\($0) by block status of \(observation.range)" }
    }

    private func check(
        _ observation: Observation, _ count: Int, _ value: (Int) -> UInt8
    ) -> String? {
        let start = observation.range.offset
        for index in 0..<count {
            let byte = value(index)
            let state = observation.start[index]
            if state == UInt16(byte) { continue }
            var legal = set(state)
            if legal.contains(byte) { continue }
            for change in observation.began
            where start + index >= change.range.offset && start + index < change.range.end {
                legal.insert(change.content.value(at: start + index - change.range.offset))
            }
            if !legal.contains(byte) {
                return "byte \(start + index) read as \(byte), legal: \(legal)"
            }
        }
        return nil
    }

    // MARK: Durability

    public func beginFlush() -> Request {
        observe(ByteRange(0, size))
    }

    public func endFlush(_ request: Request, succeeded: Bool) {
        let observation = endObservation(request)
        guard succeeded else { return }
        for index in 0..<size {
            let start = observation.start[index]
            if durable[index] == start { continue }
            var legal = set(start)
            for change in observation.began
            where index >= change.range.offset && index < change.range.end {
                legal.insert(change.content.value(at: index - change.range.offset))
            }
            let state = durable[index]
            if state < 256 {
                if !legal.contains(UInt8(state)) { durable[index] = number(of: legal) }
                continue
            }
            durable[index] = number(of: set(state).intersection(legal))
        }
    }

    /// The machine went down: nothing is in flight any more, and the disk holds what survived.
    public func crash() {
        changes = []
        observations = []
        current = durable
    }

    /// What a read of one byte may return now, with nothing in flight.
    public func legalValues(at offset: Int) -> ByteSet { set(current[offset]) }

    /// What one byte may hold after a crash.
    public func survivingValues(at offset: Int) -> ByteSet { set(durable[offset]) }
}
