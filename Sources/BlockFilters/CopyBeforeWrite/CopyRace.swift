import BlockCore
import BlockIO

/// A copy against its deadline: whoever is first decides. Confined to its thread.
final class CopyRace: @unchecked Sendable {
    private let timer: IOTimer
    private var outcome: Result<Void, BlockError>?

    init(on seat: IOSeat) {
        timer = IOTimer(on: seat)
    }

    /// The copy ended, with `error` if it failed.
    func finish(_ error: BlockError?) {
        guard outcome == nil else { return }
        outcome = error.map { .failure($0) } ?? .success(())
        timer.cancel()
    }

    /// - Throws: what the copy failed with, or `timedOut`; the copy goes on by itself then.
    func wait(nanoseconds: UInt64) async throws(BlockError) {
        if outcome == nil { _ = await timer.wait(nanoseconds: nanoseconds) }
        if let outcome { return try outcome.get() }
        let error = BlockError(
            .timedOut, "the target took longer than cbw-timeout allows")
        outcome = .failure(error)
        throw error
    }
}
