import BlockCore

/// The kinds of requests that statistics tell apart.
public enum RequestKind: Int, Sendable, CaseIterable {
    case read, write, writeZeroes, discard, flush, blockStatus
}

/// How many requests took how long: one count for each interval between boundaries.
///
/// Without boundaries of its own it goes by powers of two of a microsecond: bucket 0 is below 1 µs,
/// bucket n below 2ⁿ µs, the last one everything above.
public struct LatencyHistogram: Sendable {
    public static let bucketCount = 24
    /// In nanoseconds, ascending; `nil` for powers of two.
    private let ownBoundaries: [UInt64]?
    /// One more than there are boundaries: the first is below the first boundary.
    public private(set) var counts: [UInt64]

    /// - Parameter boundaries: in nanoseconds, ascending, all above zero; `nil` for powers of two.
    public init(boundaries: [UInt64]? = nil) {
        ownBoundaries = boundaries
        counts = [UInt64](repeating: 0, count: boundaries.map { $0.count + 1 } ?? Self.bucketCount)
    }

    public var boundaries: [UInt64] {
        ownBoundaries ?? (0..<(Self.bucketCount - 1)).map { 1000 << UInt64($0) }
    }

    @inline(__always)
    mutating func add(nanoseconds: UInt64) {
        if ownBoundaries != nil { return addBetweenBoundaries(nanoseconds) }
        let microseconds = nanoseconds / 1000
        let bucket = UInt64.bitWidth - microseconds.leadingZeroBitCount
        counts[min(bucket, Self.bucketCount - 1)] += 1
    }

    private mutating func addBetweenBoundaries(_ nanoseconds: UInt64) {
        let boundaries = ownBoundaries ?? []
        counts[boundaries.firstIndex { nanoseconds < $0 } ?? boundaries.count] += 1
    }

    /// Adds what another one counted, where it counts by the same boundaries.
    mutating func add(_ other: LatencyHistogram) {
        guard ownBoundaries == other.ownBoundaries else { return }
        for index in counts.indices { counts[index] &+= other.counts[index] }
    }
}

/// What one user did with a node.
public struct RequestStatistics: Sendable {
    public struct Counter: Sendable {
        public var requests: UInt64 = 0
        /// Requests that the storage failed.
        public var failures: UInt64 = 0
        /// Requests that could never have worked: out of range, on a read-only node.
        public var refusals: UInt64 = 0
        public var bytes: UInt64 = 0
        public var nanoseconds: UInt64 = 0
        public var latencies = LatencyHistogram()

        public init() {}
    }
    private var counters = [Counter](repeating: Counter(), count: RequestKind.allCases.count)
    /// When the last request ended, on the clock of the thread; `nil` before the first.
    public private(set) var lastUse: UInt64?

    public init() {}

    public subscript(kind: RequestKind) -> Counter { counters[kind.rawValue] }

    @inline(__always)
    mutating func note(_ kind: RequestKind, bytes: Int, since start: UInt64, now: UInt64) {
        let nanoseconds = now &- start
        counters[kind.rawValue].requests &+= 1
        counters[kind.rawValue].bytes &+= UInt64(bytes)
        counters[kind.rawValue].nanoseconds &+= nanoseconds
        counters[kind.rawValue].latencies.add(nanoseconds: nanoseconds)
        lastUse = now
    }

    mutating func noteFailure(_ kind: RequestKind, _ code: BlockError.Code, now: UInt64) {
        switch code {
        case .outOfRange, .readOnly, .invalidArgument:
            counters[kind.rawValue].refusals &+= 1
        default: counters[kind.rawValue].failures &+= 1
        }
        lastUse = now
    }

    /// Counts latencies of a kind anew, between other boundaries.
    public mutating func setBoundaries(_ boundaries: [UInt64]?, of kind: RequestKind) {
        counters[kind.rawValue].latencies = LatencyHistogram(boundaries: boundaries)
    }

    /// Adds what another user did.
    public mutating func add(_ other: RequestStatistics) {
        for index in counters.indices {
            counters[index].requests &+= other.counters[index].requests
            counters[index].failures &+= other.counters[index].failures
            counters[index].refusals &+= other.counters[index].refusals
            counters[index].bytes &+= other.counters[index].bytes
            counters[index].nanoseconds &+= other.counters[index].nanoseconds
            counters[index].latencies.add(other.counters[index].latencies)
        }
        if let use = other.lastUse { lastUse = max(lastUse ?? use, use) }
    }
}
