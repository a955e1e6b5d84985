import BlockCore
import BlockIO
import QMP
import Synchronization

/// What an `iothread` or a `main-loop` object says of its thread, and the worker threads that it has by that.
///
/// Properties are put into force as they are made, and as `qom-set` changes them; a `main-loop` has the last
/// three:
///
///     poll-max-ns        how long the engine looks for completions before the thread sleeps
///     poll-grow          the factor by which that time grows while more of it would pay; 0: 2
///     poll-shrink        what it is divided by when it does not pay; 0: it ends at once
///     aio-max-batch      operations that gather before the system gets them; 0: a turn's
///     thread-pool-min    worker threads that are there although there is nothing to do
///     thread-pool-max    worker threads at most
final class ThreadSettings: Sendable {
    let thread: IOThread
    let workers: WorkerPool
    private let workerCounts = Mutex(WorkerCounts())

    private struct WorkerCounts {
        var least = 0
        var most = 64
    }

    init(of thread: IOThread) {
        self.thread = thread
        workers = WorkerPool(threadCountMax: WorkerCounts().most)
    }

    /// Puts properties into force.
    ///
    /// - Throws: `invalidArgument`, with nothing changed, for worker threads that cannot be.
    func set(_ properties: [(name: String, number: Int)]) async throws(BlockError) {
        var counts = workerCounts.withLock { $0 }
        for property in properties {
            switch property.name {
            case "thread-pool-min": counts.least = property.number
            case "thread-pool-max": counts.most = property.number
            default: break
            }
        }
        guard counts.least <= counts.most, counts.most > 0 else {
            throw BlockError(
                .invalidArgument, "'thread-pool-min' must not be above 'thread-pool-max'",
                remedy: "give a maximum of 1 or more, and a minimum up to that")
        }
        workerCounts.withLock { $0 = counts }
        workers.setThreadCounts(least: counts.least, most: counts.most)
        let (thread, workers) = (thread, workers)
        try await thread.visit { () throws(BlockError) in
            thread.workers = workers
            thread.tuning = Self.tuning(thread.tuning, with: properties)
        }
    }

    private static func tuning(
        _ old: EngineTuning, with properties: [(name: String, number: Int)]
    ) -> EngineTuning {
        var tuning = old
        for (name, number) in properties {
            switch name {
            case "poll-max-ns": tuning.pollNanosecondsMax = UInt64(clamping: number)
            case "poll-grow": tuning.pollGrowth = UInt64(clamping: number)
            case "poll-shrink": tuning.pollShrinkage = UInt64(clamping: number)
            case "aio-max-batch": tuning.batchCountMax = number
            default: break
            }
        }
        return tuning
    }

    /// Keeps no worker thread that has nothing to do.
    func letWorkersGo() {
        workers.setThreadCounts(least: 0, most: workerCounts.withLock { $0.most })
    }
}

extension ThreadSettings {
    /// The properties of an object, as `object-add` takes them: all are numbers.
    ///
    /// - Throws: `invalidArgument` for one that is negative, and for others.
    static func read(
        _ reader: OptionReader, of kind: DaemonObject.Kind
    ) throws(BlockError) -> [(name: String, number: Int)] {
        var values: [(name: String, number: Int)] = []
        for property in kind.properties {
            let number = try reader.int(property.name) ?? property.standardNumber
            guard number >= 0 else {
                throw BlockError(
                    .invalidArgument, "\(reader.subject): '\(property.name)' cannot be negative")
            }
            values.append((property.name, number))
        }
        _ = try reader.value("id")
        try reader.finish()
        return values
    }
}

extension StorageDaemon {
    /// Makes the object of the main thread, of which there is one.
    func makeMainLoop(_ reader: OptionReader) async throws(BlockError) -> ThreadSettings {
        guard mainLoop == nil else {
            throw BlockError(
                .alreadyExists, "\(reader.subject): the main thread has a main-loop object already",
                remedy: "change that one, with qom-set")
        }
        let settings = ThreadSettings(of: thread)
        let values = try ThreadSettings.read(reader, of: .mainLoop)
        do throws(BlockError) {
            try await settings.set(values)
        } catch {
            throw error.doing(reader.subject)
        }
        return settings
    }

    /// What the main thread goes by, where there is an object that says so.
    var mainLoop: ThreadSettings? {
        for case .mainLoop(let settings) in objects.values { return settings }
        return nil
    }
}

extension ObjectProperties.Property {
    fileprivate var standardNumber: Int {
        if case .integer(let number) = standard { return number }
        return 0
    }
}
