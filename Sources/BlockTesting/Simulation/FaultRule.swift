import BlockCore
import BlockIO

/// The operations that faults can be put on.
public enum SimulatedOperation: UInt8, Sendable, CaseIterable {
    case open, read, write, synchronize, allocate, setSize
    case accept, connect, receive, send
    /// That written data, which the page cache is to drop, gets to the storage; it can fail.
    case writeBack
}

/// What goes wrong, and when: at the Nth of some operations.
public struct FaultRule: Sendable {
    public enum Effect: Sendable {
        /// Fails with an `errno` value, positive. A failing write may have written a part.
        case fail(Int32)
        /// Never completes, and has no effect, until ``Simulation/releaseHung()`` or a cancellation.
        case hang
        /// Takes this many nanoseconds longer.
        case delay(UInt64)
        /// The machine goes down just before.
        case crash
    }

    public var operation: SimulatedOperation
    /// Only on this file; `nil` for all, sockets included.
    public var path: String?
    /// Only operations that touch this range of the file.
    public var range: ByteRange?
    public var effect: Effect
    /// How many operations that match go well first.
    public var skip: Int
    /// How many fail after that.
    public var times: Int
    /// How many in 1000 of those that are to fail do.
    public var perMille: Int

    public init(
        _ operation: SimulatedOperation, path: String? = nil, range: ByteRange? = nil,
        _ effect: Effect, skip: Int = 0, times: Int = .max, perMille: Int = 1000
    ) {
        self.operation = operation
        self.path = path
        self.range = range
        self.effect = effect
        self.skip = skip
        self.times = times
        self.perMille = perMille
    }

    func matches(_ operation: SimulatedOperation, _ path: String?, _ range: ByteRange?) -> Bool {
        guard operation == self.operation, times > 0 else { return false }
        if let wanted = self.path, wanted != path { return false }
        if let wanted = self.range, range.map({ $0.overlaps(wanted) }) != true { return false }
        return true
    }

    /// Counts an operation that matches. - Returns: what happens to it.
    mutating func strike(_ random: inout SeededRandom) -> Effect? {
        if skip > 0 {
            skip -= 1
            return nil
        }
        guard perMille >= 1000 || random.chance(perMille) else { return nil }
        if times != .max { times -= 1 }
        return effect
    }
}

/// How a simulated machine behaves. Times are nanoseconds of its own clock.
public struct SimulationOptions: Sendable {
    /// A file operation takes a time from here, by chance: so operations overtake each other.
    public var fileNanoseconds: ClosedRange<Int> = 20_000...2_000_000
    public var synchronizeNanoseconds: ClosedRange<Int> = 100_000...10_000_000
    public var socketNanoseconds: ClosedRange<Int> = 5_000...300_000
    /// In 1000 reads and writes, how many move less than was asked for.
    public var shortPerMille = 50
    /// In 1000 operations that may be done at once (from the page cache, as it were), how many are.
    public var immediatePerMille = 300
    /// Whether writes may be made at once at all.
    public var immediateWrites = ImmediateWrites.unlessBlocked
    /// In 1000 reads and writes of more than a sector, how many happen in two steps, with a time in
    /// between in which others run.
    public var splitPerMille = 250
    /// What a socket holds between sending and receiving, in bytes.
    public var socketBufferBytes = 65_536
    /// What a crash does to what was not synchronised.
    public var losses = CrashLosses.mixed
    /// The machine goes down when its clock gets there.
    public var crashNanoseconds: UInt64?
    /// Seconds of real time without anything to do after which a boot counts as stuck.
    public var stuckSeconds = 10
    /// Keep a line for each event: see ``Simulation/trace``.
    public var recordsTrace = false

    public init() {}

    /// No chance of anything unusual but the order of completions.
    public static var calm: SimulationOptions {
        var options = SimulationOptions()
        options.shortPerMille = 0
        options.splitPerMille = 0
        return options
    }
}
