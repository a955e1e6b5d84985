import BlockCore
import Synchronization

/// The first error of workers that run side by side.
final class FirstFailure: Sendable {
    private let error = Mutex<BlockError?>(nil)

    func note(_ failure: BlockError) {
        error.withLock { $0 = $0 ?? failure }
    }

    var first: BlockError? { error.withLock { $0 } }
}
