/// How an engine weighs the processor's time against that of requests.
public struct EngineTuning: Sendable, Equatable {
    /// How long an engine that polls looks for completions at most before the thread sleeps, in
    /// nanoseconds; 0 has it sleep at once.
    public var pollNanosecondsMax: UInt64 = 50_000
    /// The factor by which the time grows where looking longer would have paid; 0 leaves it to the engine.
    public var pollGrowth: UInt64 = 0
    /// What the time is divided by where looking did not pay; 0 ends it at once.
    public var pollShrinkage: UInt64 = 0
    /// Operations that gather within a turn before the system gets them; 0 for all that come.
    public var batchCountMax = 0

    public init() {}
}
