import BlockCore
import BlockGraph
import QMP

/// The rules of one blkdebug node and its state: which events make which requests fail.
///
///     event ──▶ rules of the event and the state ──▶ errors that are armed from then on
///                                            └─────▶ the next state
///     request ──▶ the first armed error of its kind and place ──▶ fails
///
/// Invariants:
/// 1. An event that arms errors disarms those of earlier events; one that arms none leaves them.
/// 2. All rules of an event are looked at in the state before it.
struct DebugRules {
    /// What a request is, as option `iotype` names it.
    enum Kind: String, Sendable, CaseIterable {
        case read, write
        case writeZeroes = "write-zeroes"
        case discard, flush
        case blockStatus = "block-status"
    }

    struct Injection: Equatable {
        var event: DebugEvent
        /// 0: in any state.
        var state = 0
        /// `nil`: all but questions for block status.
        var kind: Kind?
        /// The `errno` value; 0 lets the request through, and those of later rules too.
        var systemError: Int32
        /// In bytes; `nil`: anywhere.
        var offset: Int?
        var isOnce = false
        /// Without letting others run first.
        var isImmediate = false
    }

    struct StateChange: Equatable {
        var event: DebugEvent
        var state = 0
        var newState: Int
    }

    /// Rules of one node: more serve no test.
    static let ruleCountMax = 10_000

    private(set) var injections: [Injection?] = []
    private(set) var changes: [StateChange] = []
    private(set) var state = 1
    /// Places in `injections`.
    private var armed: [Int] = []

    init() {}

    // MARK: Events and requests

    mutating func reach(_ event: DebugEvent) {
        let matching = injections.indices.filter { index in
            injections[index].map { $0.event == event && applies($0.state) } ?? false
        }
        if !matching.isEmpty { armed = matching }
        if let change = changes.first(where: { $0.event == event && applies($0.state) }) {
            state = change.newState
        }
    }

    private func applies(_ wanted: Int) -> Bool { wanted == 0 || wanted == state }

    /// What a request fails with, if it does.
    ///
    /// - Parameter range: `nil` for a request without a place.
    mutating func strike(_ kind: Kind, _ range: ByteRange?) -> Injection? {
        let found = armed.first { injections[$0].map { Self.meets($0, kind, range) } ?? false }
        guard let index = found, let injection = injections[index], injection.systemError != 0
        else { return nil }
        if injection.isOnce {
            injections[index] = nil
            armed.removeAll { $0 == index }
        }
        return injection
    }

    private static func meets(_ injection: Injection, _ kind: Kind, _ range: ByteRange?) -> Bool {
        guard injection.kind.map({ $0 == kind }) ?? (kind != .blockStatus) else { return false }
        guard let offset = injection.offset else { return true }
        return range.map { $0.offset <= offset && offset < $0.end } ?? false
    }

    // MARK: Options

    /// Reads one member of `inject-error`, or one section of a configuration file.
    mutating func addInjection(_ reader: OptionReader) throws(BlockError) {
        let event = try Self.event(reader)
        let state = try Self.number(reader, "state") ?? 0
        let kind = try reader.enumeration("iotype", as: Kind.self)
        let systemError = try Self.number(reader, "errno") ?? 5
        let sector = try reader.int("sector")
        guard let code = Int32(exactly: systemError) else {
            throw Self.outOfBounds(reader, "errno")
        }
        var injection = Injection(event: event, state: state, kind: kind, systemError: code)
        if let sector, sector != -1 {
            guard sector >= 0, let offset = sector.multiplied(by: 512) else {
                throw Self.outOfBounds(reader, "sector")
            }
            injection.offset = offset
        }
        injection.isOnce = try reader.bool("once") ?? false
        injection.isImmediate = try reader.bool("immediately") ?? false
        try reader.finish()
        try checkCount()
        injections.append(injection)
    }

    /// Reads one member of `set-state`, or one section of a configuration file.
    mutating func addStateChange(_ reader: OptionReader) throws(BlockError) {
        let event = try Self.event(reader)
        let state = try Self.number(reader, "state") ?? 0
        guard let newState = try Self.number(reader, "new_state") else {
            throw BlockError(.invalidArgument, "\(reader.subject): option 'new_state' is missing")
        }
        try reader.finish()
        try checkCount()
        changes.append(StateChange(event: event, state: state, newState: newState))
    }

    private func checkCount() throws(BlockError) {
        guard injections.count + changes.count < Self.ruleCountMax else {
            throw BlockError(.exhausted, "there are more than \(Self.ruleCountMax) rules")
        }
    }

    private static func event(_ reader: OptionReader) throws(BlockError) -> DebugEvent {
        guard let event = try reader.enumeration("event", as: DebugEvent.self) else {
            throw BlockError(.invalidArgument, "\(reader.subject): option 'event' is missing")
        }
        return event
    }

    private static func number(
        _ reader: OptionReader, _ key: String
    ) throws(BlockError) -> Int? {
        guard let value = try reader.int(key) else { return nil }
        guard value >= 0 else { throw outOfBounds(reader, key) }
        return value
    }

    private static func outOfBounds(_ reader: OptionReader, _ key: String) -> BlockError {
        BlockError(.invalidArgument, "\(reader.subject): option '\(key)' is out of bounds")
    }
}
