import BlockCore
import QMP

/// What a throttle group limits: bytes and operations a second, of all requests or of one direction.
///
/// A rate has an average; a higher one for bursts, if it says so; and how long a burst may last.
/// Names are those of `ThrottleLimits` in QEMU's interface: `iops-total`, `bps-read-max`,
/// `bps-write-max-length`, `iops-size`.
public struct ThrottleLimits: Sendable, Equatable {
    public enum Kind: Int, Sendable, CaseIterable {
        case operationsTotal, operationsRead, operationsWrite, bytesTotal, bytesRead, bytesWrite

        /// The option's name; `-max` and `-max-length` follow it.
        public var name: String {
            switch self {
            case .operationsTotal: "iops-total"
            case .operationsRead: "iops-read"
            case .operationsWrite: "iops-write"
            case .bytesTotal: "bps-total"
            case .bytesRead: "bps-read"
            case .bytesWrite: "bps-write"
            }
        }
    }

    public struct Rate: Sendable, Equatable {
        /// Units a second, in the long run; 0 for no limit.
        public var average = 0
        /// Units a second in a burst; 0 where bursts have no rate of their own.
        public var burst = 0
        /// Seconds that a burst may last.
        public var burstSeconds = 1

        public init() {}
    }

    /// The largest number of any option.
    public static let valueMax = 1_000_000_000_000_000

    private var rates = [Rate](repeating: Rate(), count: Kind.allCases.count)
    /// A request of more bytes counts as several operations; 0: always as one.
    public var operationBytes = 0

    public init() {}

    public subscript(kind: Kind) -> Rate {
        get { rates[kind.rawValue] }
        set { rates[kind.rawValue] = newValue }
    }

    // MARK: Options

    /// Takes the options that are given; the others stay.
    ///
    /// - Parameter prefix: `x-` where they are properties of the object.
    public mutating func take(_ reader: OptionReader, prefix: String = "") throws(BlockError) {
        for kind in Kind.allCases {
            let name = prefix + kind.name
            if let value = try reader.size(name) { self[kind].average = value }
            if let value = try reader.size("\(name)-max") { self[kind].burst = value }
            if let value = try reader.size("\(name)-max-length") {
                guard value > 0, value <= Int(UInt32.max) else {
                    throw BlockError(
                        .invalidArgument, "'\(name)-max-length' must be 1 to \(UInt32.max) seconds")
                }
                self[kind].burstSeconds = value
            }
        }
        if let value = try reader.size("\(prefix)iops-size") { operationBytes = value }
    }

    /// All of them, as `qom-get` of `limits` shows them.
    public var json: JSONValue {
        var object = JSONObject()
        for kind in Kind.allCases {
            object[kind.name] = .integer(self[kind].average)
            object["\(kind.name)-max"] = .integer(self[kind].burst)
            object["\(kind.name)-max-length"] = .integer(self[kind].burstSeconds)
        }
        object["iops-size"] = .integer(operationBytes)
        return .object(object)
    }

    // MARK: Checks

    /// - Throws: `invalidArgument` for limits that contradict each other.
    public func validate() throws(BlockError) {
        for kind in Kind.allCases { try validate(kind) }
        for part in [\Rate.average, \Rate.burst] {
            try exclude(.bytesTotal, .bytesRead, .bytesWrite, part)
            try exclude(.operationsTotal, .operationsRead, .operationsWrite, part)
        }
        let limitsOperations = [Kind.operationsTotal, .operationsRead, .operationsWrite]
            .contains { self[$0].average > 0 }
        if operationBytes > 0, !limitsOperations {
            throw BlockError(.invalidArgument, "'iops-size' is of use with a limit of iops only")
        }
        guard operationBytes <= Self.valueMax else { throw tooLarge("iops-size") }
    }

    private func validate(_ kind: Kind) throws(BlockError) {
        let rate = self[kind]
        for value in [rate.average, rate.burst] where value > Self.valueMax {
            throw tooLarge(kind.name)
        }
        if rate.burst > 0, rate.average == 0 {
            throw BlockError(.invalidArgument, "'\(kind.name)-max' needs '\(kind.name)'")
        }
        if rate.burst > 0, rate.burst < rate.average {
            throw BlockError(.invalidArgument, "'\(kind.name)-max' is below '\(kind.name)'")
        }
        guard rate.burstSeconds > 1 else { return }
        if rate.burst == 0 {
            throw BlockError(
                .invalidArgument, "'\(kind.name)-max-length' needs '\(kind.name)-max'")
        }
        guard let units = rate.burst.multiplied(by: rate.burstSeconds), units <= Self.valueMax
        else {
            throw BlockError(
                .invalidArgument, "'\(kind.name)-max-length' is too long for such a burst")
        }
    }

    private func exclude(
        _ total: Kind, _ read: Kind, _ write: Kind, _ part: KeyPath<Rate, Int>
    ) throws(BlockError) {
        if self[total][keyPath: part] > 0,
            self[read][keyPath: part] > 0 || self[write][keyPath: part] > 0
        {
            throw BlockError(
                .invalidArgument,
                "'\(total.name)' excludes '\(read.name)' and '\(write.name)'")
        }
    }

    private func tooLarge(_ name: String) -> BlockError {
        BlockError(.invalidArgument, "'\(name)' is above \(Self.valueMax)")
    }
}
