import BlockCore

/// The answer to a question about block status: runs that follow each other, from where it began.
///
/// Who asks brings the list, says by `limit` how many runs are welcome, and uses it again for the next
/// question, so that a walk over a million runs takes memory once.
///
/// Invariants:
/// 1. There are at most `limit` runs, and none is empty.
/// 2. `byteCount` is the sum of their lengths: the next question begins so far behind the last one.
///
/// Confined to the thread of the graph that is asked, and to one question at a time.
public final class BlockStatusList: @unchecked Sendable {
    /// What walks over an image ask for at a time: enough that asking costs little, and not so much
    /// that others wait for the answer.
    public static let walkLimit = 512

    public let limit: Int
    public private(set) var runs: [BlockStatus] = []
    /// Bytes that the runs are about.
    public private(set) var byteCount = 0
    private var lower: BlockStatusList?
    private var single: BlockStatusList?

    /// - Parameter limit: of runs, at least 1.
    public init(limit: Int = walkLimit) {
        precondition(limit > 0)
        self.limit = limit
        runs.reserveCapacity(min(limit, Self.walkLimit))
    }

    public var isEmpty: Bool { runs.isEmpty }
    /// Whether there is room only for what goes on with the last run.
    public var isFull: Bool { runs.count >= limit }

    /// Adds a run behind the others, to the last one where that goes on with it.
    ///
    /// - Returns: `false` where there was no room for it.
    @discardableResult
    public func append(_ run: BlockStatus) -> Bool {
        if run.count <= 0 { return true }
        if let last = runs.indices.last, Self.goesOn(run, after: runs[last]) {
            runs[last].count += run.count
        } else {
            if isFull { return false }
            runs.append(run)
        }
        byteCount += run.count
        return true
    }

    private static func goesOn(_ next: BlockStatus, after last: BlockStatus) -> Bool {
        guard last.flags == next.flags, last.depth == next.depth else { return false }
        switch (last.mapping, next.mapping) {
        case (nil, nil): return true
        case (let one?, let other?):
            return one.offset &+ last.count == other.offset && one.node === other.node
        default: return false
        }
    }

    public func removeAll() {
        runs.removeAll(keepingCapacity: true)
        byteCount = 0
    }

    // MARK: Layers and drivers

    /// A list as long, for what has to be asked on the way to this answer: of another layer.
    public var below: BlockStatusList {
        if let lower { return lower }
        let list = BlockStatusList(limit: limit)
        lower = list
        return list
    }

    /// A list for one run, for what has to be asked on the way to this answer: of a child.
    public var aside: BlockStatusList {
        if let single { return single }
        let list = BlockStatusList(limit: 1)
        single = list
        return list
    }

    /// Changes what is said of each run, not how long it is; runs that become alike stay apart.
    public func change(_ body: (inout BlockStatus) -> Void) {
        for index in runs.indices { body(&runs[index]) }
    }

    /// Leaves out the first `skipped` bytes, and what is more than `count` bytes behind them. At least a byte
    /// stays.
    func trim(skipping skipped: Int, to count: Int) {
        if skipped == 0, byteCount <= count { return }
        let all = runs
        var skip = min(skipped, byteCount - 1)
        removeAll()
        for var run in all {
            let passed = min(skip, run.count)
            skip -= passed
            run.count = min(run.count - passed, count - byteCount)
            run.mapping?.offset += passed
            append(run)
        }
    }

    /// The last that is done to what one node says.
    func complete(endsNode: Bool) {
        precondition(!isEmpty, "a driver answers with one run at least")
        for index in runs.indices {
            // A child's answer, which was handed on, may have ended the child.
            runs[index].flags.remove(.endOfNode)
            if !runs[index].flags.isDisjoint(with: [.data, .zero]) {
                runs[index].flags.insert(.allocated)
            }
        }
        if endsNode { markEnd() }
    }

    /// The last run reaches the end of the node.
    func markEnd() {
        if let last = runs.indices.last { runs[last].flags.insert(.endOfNode) }
    }
}
