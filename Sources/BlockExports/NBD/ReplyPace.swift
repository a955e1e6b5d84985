/// How many replies leave together.
///
/// A client whose requests come N at a time and whose N replies leave at the end of the turn has nothing to do
/// meanwhile, and after that the server has not: the two take turns, and each sleeps while the other works. Where
/// the replies leave in three parts the client goes on with the first ones while the server works on the rest,
/// and neither sleeps. One reply at a time would do that as well, but each call costs.
struct ReplyPace {
    private static let partCount = 3
    /// Receives after which most of what was seen is forgotten.
    private static let memory = 64

    /// How many requests come at a time at most, of late; in 1024ths.
    private var requestCount = 0

    /// So many requests came with a receive.
    mutating func received(_ count: Int) {
        requestCount = max(count << 10, requestCount - requestCount / Self.memory)
    }

    var batchCount: Int { max(1, (requestCount >> 10) / Self.partCount) }
}
