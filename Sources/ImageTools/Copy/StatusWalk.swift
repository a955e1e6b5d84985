import BlockCore
import BlockGraph

/// Walks over what an image's layers say of its bytes, asking for many runs at a time.
///
/// What it knows was true when it asked: whoever changes the image meanwhile does so behind the walk.
/// Confined to the session's thread; one at a time asks.
final class StatusWalk: @unchecked Sendable {
    /// Who is asked.
    enum Layers {
        /// The whole chain.
        case all
        /// The image alone.
        case top
    }

    private let edge: Edge
    private let layers: Layers
    private let answer = BlockStatusList()
    /// The run that was looked at last, and where it begins.
    private var index = 0
    private var start = 0

    init(_ edge: Edge, _ layers: Layers = .all) {
        self.edge = edge
        self.layers = layers
    }

    /// What is known from `offset` on; up to `limit` at most. The offset is within the image, and below
    /// the limit; it goes up from one call to the next.
    func run(at offset: Int, limit: Int) async throws(BlockError) -> BlockStatus {
        if let known = known(at: offset, limit: limit) { return known }
        let asked = ByteRange(from: offset, to: min(limit, edge.size))
        (index, start) = (0, offset)
        switch layers {
        case .all: try await edge.chainStatus(asked, into: answer)
        case .top: try await edge.blockStatus(asked, into: answer)
        }
        return answer.runs[0]
    }

    private func known(at offset: Int, limit: Int) -> BlockStatus? {
        guard offset >= start else { return nil }
        let runs = answer.runs
        while index < runs.count, start + runs[index].count <= offset {
            start += runs[index].count
            index += 1
        }
        guard index < runs.count else { return nil }
        var run = runs[index]
        let passed = offset - start
        run.count = min(run.count - passed, limit - offset)
        run.mapping?.offset += passed
        return run
    }
}
