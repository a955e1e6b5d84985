import BlockCore
import BlockIO

/// Something that ends, and takes as long for it as storage holds requests back. Confined to its thread.
final class Ending: @unchecked Sendable {
    /// How long the command that asked for it waits: mostly it is over at once.
    static let nanosecondsMax: UInt64 = 500_000_000

    private let timer: IOTimer
    private var outcome: Result<Void, BlockError>?
    /// The command has been replied to.
    private(set) var isLeftAlone = false
    var task: Task<Void, Never>?

    init(on thread: IOThread) {
        timer = IOTimer(on: thread)
    }

    func finish(_ outcome: Result<Void, BlockError>) {
        self.outcome = outcome
        timer.cancel()
    }

    /// - Returns: `nil` where it goes on by itself.
    func wait() async -> Result<Void, BlockError>? {
        if outcome == nil { _ = await timer.wait(nanoseconds: Self.nanosecondsMax) }
        isLeftAlone = outcome == nil
        return outcome
    }
}

extension StorageDaemon {
    /// Ends something, for a command: other commands run meanwhile, and past
    /// ``Ending/nanosecondsMax`` it goes on by itself while the command is replied to.
    ///
    /// Whatever commands find it by is gone, or says that it is going, before this is called.
    ///
    /// - Parameter what: as the log names it.
    /// - Throws: what it ended with; where it goes on by itself, that is logged.
    func end(
        _ what: String, _ body: sending @escaping () async throws(BlockError) -> Void
    ) async throws(BlockError) {
        let ending = Ending(on: thread)
        endings.append(ending)
        ending.task = thread.spawn { [self] in
            var outcome: Result<Void, BlockError> = .success(())
            do throws(BlockError) { try await body() } catch { outcome = .failure(error) }
            endings.removeAll { $0 === ending }
            ending.finish(outcome)
            if ending.isLeftAlone, case .failure(let error) = outcome { log("\(what): \(error)") }
        }
        turns.pass()
        let outcome = await ending.wait()
        await turns.take()
        try outcome?.get()
    }
}
