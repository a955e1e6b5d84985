import BlockCore

/// One rate of a throttle group, as a leaky bucket: what requests pour in runs out at the average.
///
/// A request may go while the bucket is not over its brim; it is poured in whole then, however large it
/// is, and those after it wait until the bucket has run down to the brim. So the average holds over any
/// time much longer than what fits in.
///
///     bursts not limited     brim: a tenth of a second's worth of the average
///     burst of b a second,   brim: b times the seconds; and, for more than a second, a second bucket
///     for some seconds       that runs out at b, with a tenth of a second's worth as its brim
///
/// Invariant: levels are not negative.
struct ThrottleBucket {
    private let rate: ThrottleLimits.Rate
    private let brim: Double
    private let burstBrim: Double
    private var level = 0.0
    private var burstLevel = 0.0

    /// No wait is computed longer: after it, one looks again.
    private static let waitSecondsMax = 3600.0

    init(_ rate: ThrottleLimits.Rate) {
        self.rate = rate
        let (average, burst) = (Double(rate.average), Double(rate.burst))
        brim = rate.burst > 0 ? burst * Double(rate.burstSeconds) : average / 10
        burstBrim = burst / 10
    }

    mutating func pour(_ units: Double) {
        guard rate.average > 0 else { return }
        level += units
        if rate.burstSeconds > 1 { burstLevel += units }
    }

    mutating func leak(seconds: Double) {
        level = max(level - Double(rate.average) * seconds, 0)
        burstLevel = max(burstLevel - Double(rate.burst) * seconds, 0)
    }

    /// How long it takes until a request may go.
    var waitNanoseconds: UInt64 {
        guard rate.average > 0 else { return 0 }
        var seconds = max(0, (level - brim) / Double(rate.average))
        if rate.burstSeconds > 1 {
            seconds = max(seconds, (burstLevel - burstBrim) / Double(rate.burst))
        }
        return UInt64((min(seconds, Self.waitSecondsMax) * 1e9).rounded(.up))
    }
}
