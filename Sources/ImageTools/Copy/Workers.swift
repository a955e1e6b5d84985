import BlockCore
import BlockIO

/// Tasks of one thread that do the same until there is nothing left. Confined to it.
final class Workers: @unchecked Sendable {
    private let thread: IOThread
    private(set) var failure: BlockError?
    private var running = 0
    private var waiting: UnsafeContinuation<Void, Never>?

    private init(_ thread: IOThread) {
        self.thread = thread
    }

    /// Runs `count` workers, each calling `step` until it returns `false` or one worker failed.
    ///
    /// - Throws: the first failure, once all have ended.
    static func run(
        _ count: Int, on thread: IOThread,
        _ step: @escaping @Sendable () async throws(BlockError) -> Bool
    ) async throws(BlockError) {
        IOBuffer.keepForReuse(atMost: Limits.busyBufferPoolBytesMax)
        defer { IOBuffer.keepForReuse(atMost: Limits.bufferPoolBytesMax) }
        let workers = Workers(thread)
        workers.running = count
        for _ in 0..<count {
            thread.spawn {
                do throws(BlockError) {
                    while workers.failure == nil, try await step() {}
                } catch {
                    workers.failure = workers.failure ?? error
                }
                workers.end()
            }
        }
        await workers.untilDone()
        if let failure = workers.failure { throw failure }
    }

    private func end() {
        running -= 1
        if running == 0 { waiting?.resume() }
    }

    private func untilDone() async {
        if running > 0 { await withUnsafeContinuation { waiting = $0 } }
    }
}
