import BlockCore

/// The kinds of requests that statistics tell apart.
public enum RequestKind: Int, Sendable, CaseIterable {
    case read, write, writeZeroes, discard, flush, blockStatus
}

/// Latencies in powers of two of a microsecond: bucket 0 is below 1 µs, bucket n below 2ⁿ µs, the
/// last one everything above.
public struct LatencyHistogram: Sendable {
    public static let bucketCount = 24
    public fileprivate(set) var counts = [UInt64](repeating: 0, count: bucketCount)

    @inline(__always)
    mutating func add(nanoseconds: UInt64) {
        let microseconds = nanoseconds / 1000
        let bucket = UInt64.bitWidth - microseconds.leadingZeroBitCount
        counts[min(bucket, Self.bucketCount - 1)] += 1
    }
}

/// What one user did with a node.
public struct RequestStatistics: Sendable {
    public struct Counter: Sendable {
        public var requests: UInt64 = 0
        public var failures: UInt64 = 0
        public var bytes: UInt64 = 0
        public var nanoseconds: UInt64 = 0
        public var latencies = LatencyHistogram()
    }
    fileprivate var counters = [Counter](repeating: Counter(), count: RequestKind.allCases.count)

    public init() {}

    public subscript(kind: RequestKind) -> Counter { counters[kind.rawValue] }

    @inline(__always)
    mutating func note(_ kind: RequestKind, bytes: Int, nanoseconds: UInt64) {
        counters[kind.rawValue].requests &+= 1
        counters[kind.rawValue].bytes &+= UInt64(bytes)
        counters[kind.rawValue].nanoseconds &+= nanoseconds
        counters[kind.rawValue].latencies.add(nanoseconds: nanoseconds)
    }

    mutating func noteFailure(_ kind: RequestKind) {
        counters[kind.rawValue].failures &+= 1
    }
}

extension RequestStatistics {
    /// Adds what another user did.
    public mutating func add(_ other: RequestStatistics) {
        for kind in RequestKind.allCases {
            let index = kind.rawValue
            counters[index].requests &+= other.counters[index].requests
            counters[index].failures &+= other.counters[index].failures
            counters[index].bytes &+= other.counters[index].bytes
            counters[index].nanoseconds &+= other.counters[index].nanoseconds
            counters[index].latencies.add(other.counters[index].latencies)
        }
    }
}

extension LatencyHistogram {
    mutating func add(_ other: LatencyHistogram) {
        for index in counts.indices { counts[index] &+= other.counts[index] }
    }
}
