import BlockCore
import Synchronization

/// Where tasks run that may move from one ``IOThread`` to another: a connection's, a node's.
///
/// A task keeps the executor that it was started with for all its life. A seat is one that hands what is
/// ready to the thread on which it stands at that moment: move the seat, and all its tasks go on there,
/// wherever they waited.
///
///     task ── resumes ──▶ seat ──▶ thread a        before the move
///                           ╰────▶ thread b        from then on
///
/// Invariants:
/// 1. A seat is moved by code that runs on the thread on which it stands: none of its tasks runs
///    meanwhile, and what they did before happened before what they do on the new thread.
/// 2. What was ready on the old thread and has not begun goes on to the new one.
///
/// Whoever moves a seat has made everything ready that its tasks touch: the move comes last.
public final class IOSeat: TaskExecutor, @unchecked Sendable {
    private let place: Atomic<Unmanaged<IOThread>>
    /// Every thread it ever stood on stays: work for it may be on its way there. Touched by the mover.
    private var threads: [IOThread]

    public init(on thread: IOThread) {
        place = Atomic(Unmanaged.passUnretained(thread))
        threads = [thread]
    }

    /// Where it stands. From any thread; stays true for whoever runs there.
    @inline(__always)
    public var thread: IOThread { place.load(ordering: .acquiring).takeUnretainedValue() }

    /// Whether the caller runs where it stands.
    @inline(__always)
    public var isCurrent: Bool { thread.isCurrent }

    /// Has its tasks go on on `other`; see the invariants.
    public func move(to other: IOThread) {
        thread.preconditionOnThread()
        take(to: other)
    }

    /// ``move(to:)`` for a seat that has no tasks, from wherever its owner is.
    public func take(to other: IOThread) {
        if !threads.contains(where: { $0 === other }) { threads.append(other) }
        place.store(Unmanaged.passUnretained(other), ordering: .releasing)
    }

    /// Returns where the seat stands: for a task of it that has just moved it.
    public func arrive() async {
        await reach { isCurrent }
    }

    /// Starts a task. From where the seat stands it begins at once, before `spawn` returns.
    @discardableResult
    public func spawn(_ body: sending @escaping @isolated(any) () async -> Void) -> Task<
        Void, Never
    > {
        start(body, isThere: isCurrent)
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        thread.enqueue(UnownedJob(job), of: self)
    }
}

extension TaskExecutor {
    /// Starts a task here. It begins at once, before this returns, where the caller `isThere` already.
    @inline(__always)
    func start(
        _ body: sending @escaping @isolated(any) () async -> Void, isThere: Bool
    ) -> Task<Void, Never> {
        if isThere { return Task.immediate(executorPreference: self, operation: body) }
        return Task(executorPreference: self, operation: body)
    }

    /// Suspends the calling task, which prefers this executor, until it is where that is. Not by yielding,
    /// which goes through the threads of Swift's own pool.
    func reach(_ isThere: () -> Bool) async {
        while !isThere() {
            await withUnsafeContinuation { continuation in
                // Where this comes before the suspension, the task goes on where it is: once more then.
                _ = Task(executorPreference: self) { continuation.resume() }
            }
        }
    }

    /// Carries out a part of the calling task here, and comes back.
    func carryOut<T>(
        _ isThere: () -> Bool, _ body: () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        if isThere() { return try await body() }
        let result = await withTaskExecutorPreference(self) { () async -> Result<T, BlockError> in
            // The preference counts from the next time that the task is resumed.
            await reach(isThere)
            do throws(BlockError) {
                return .success(try await body())
            } catch {
                return .failure(error)
            }
        }
        return try result.get()
    }
}

extension IOThread {
    /// Carries out a part of the calling task on this thread, and comes back to where it was called.
    ///
    /// It is one task all the time: what it hands in and out need not be `Sendable`, but belongs to
    /// whichever thread it is used on.
    public func visit<T>(
        _ body: () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        try await carryOut({ isCurrent }, body)
    }
}

extension IOSeat {
    /// Carries out a part of the calling task where the seat stands, and comes back.
    public func visit<T>(
        _ body: () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        try await carryOut({ isCurrent }, body)
    }
}
