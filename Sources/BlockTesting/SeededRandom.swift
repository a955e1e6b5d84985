/// Numbers that follow from a seed alone: SplitMix64.
///
/// Not for secrets. Every random choice of a test comes from one of these, so that the seed in a
/// failure's message brings the failure back.
public struct SeededRandom: RandomNumberGenerator, Sendable {
    private var state: UInt64

    public init(seed: UInt64) {
        state = seed
    }

    public mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xbf58_476d_1ce4_e5b9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94d0_49bb_1331_11eb
        return mixed ^ (mixed >> 31)
    }

    /// A number in `0..<bound`; `bound` is positive.
    public mutating func below(_ bound: Int) -> Int {
        precondition(bound > 0)
        return Int(next() % UInt64(bound))
    }

    public mutating func between(_ range: ClosedRange<Int>) -> Int {
        range.lowerBound + below(range.upperBound - range.lowerBound + 1)
    }

    /// `true` in `perMille` of 1000 cases.
    public mutating func chance(_ perMille: Int) -> Bool {
        perMille > 0 && below(1000) < perMille
    }

    /// A generator of its own, for a part whose use of numbers must not disturb others.
    public mutating func fork() -> SeededRandom {
        SeededRandom(seed: next())
    }
}
