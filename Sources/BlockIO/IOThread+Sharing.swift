import BlockCore
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

// Work that is cut into pieces, for all processors at once.

extension WorkerPool {
    /// Processors that the system has for this process's threads; at least 1.
    public static let processorCount = max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN)))
}

extension IOThread {
    /// Has worker threads share `count` pieces of CPU-heavy work, and comes back when all are done.
    ///
    /// - Parameter work: called on each of the threads that take part, one for each processor at
    ///   most. It calls `next` for the index of the next piece until there is none.
    public func offload(
        sharing count: Int, _ work: @escaping @Sendable (_ next: () -> Int?) -> Void
    ) async {
        let pieces = SharedPieces(count)
        let workerCount = engine.offloadsWork ? min(count, WorkerPool.processorCount) : 1
        guard workerCount > 1 else {
            await offload { work { pieces.next() } }
            return
        }
        await withUnsafeContinuation { (continuation: UnsafeContinuation<Void, Never>) in
            pieces.workers.store(workerCount, ordering: .relaxed)
            for _ in 0..<workerCount {
                workers.submit {
                    work { pieces.next() }
                    if pieces.isLastToLeave { continuation.resume() }
                }
            }
        }
    }
}

/// Hands out each index once.
private final class SharedPieces: Sendable {
    private let count: Int
    private let taken = Atomic<Int>(0)
    let workers = Atomic<Int>(0)

    init(_ count: Int) {
        self.count = count
    }

    func next() -> Int? {
        let index = taken.wrappingAdd(1, ordering: .relaxed).oldValue
        return index < count ? index : nil
    }

    /// What the others wrote is there to be read by whoever leaves last.
    var isLastToLeave: Bool {
        workers.wrappingSubtract(1, ordering: .acquiringAndReleasing).newValue == 0
    }
}
