import BlockCore
import Synchronization

#if os(Linux)
import CLinux
#endif

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// One operating-system thread that owns one engine and runs every task of the graphs bound to it.
///
/// A turn of its loop: run the jobs that are ready, then the end-of-turn hooks (replies gathered over
/// the turn leave in one call), then give the engine all that was submitted and take completions.
///
/// Invariants:
/// 1. Jobs, hooks, timers, the table of pending operations and the engine are touched on the thread
///    only. What other threads may do goes through `mailbox`.
/// 2. Each submitted operation completes exactly once; its table entry keeps its memory alive until
///    then.
/// 3. The thread sleeps only when nothing is ready; whoever adds to the mailbox wakes it.
///
/// Tasks get here by `spawn` or `run`, which give them this thread as their executor preference: the
/// async functions they call run here, without a hop, as long as they stay nonisolated. Tasks of an
/// ``IOSeat`` run here while the seat stands here.
public final class IOThread: TaskExecutor, @unchecked Sendable {
    public let name: String
    private var engineBox: (any IOEngine)?
    private var thread = pthread_t(bitPattern: 0)
    /// As the system's tools show the thread; 0 where they do not.
    public private(set) var systemIdentifier = 0

    // Confined to the thread.
    private var ready: [ReadyJob] = []
    private var running: [ReadyJob] = []
    private var pending = PendingTable()
    private var hooks: [any EndOfTurnHook] = []
    private var isRetiring = false
    var timers = TimerQueue()

    /// Something to run, and whose task it is: the thread's own, or a seat's.
    private struct ReadyJob {
        let job: UnownedJob
        let seat: IOSeat?
    }

    private struct Mailbox {
        var jobs: [ReadyJob] = []
        var isStopping = false
        /// Stops once nothing is pending.
        var isRetiring = false
        /// The loop has ended: nothing runs here any more.
        var isOver = false
    }
    private let mailbox = Mutex(Mailbox())
    /// Set while the mailbox holds something, so that a busy turn need not lock to know.
    private let mailboxIsFull = Atomic<Bool>(false)
    private let isAsleep = Atomic<Bool>(false)

    /// Starts the thread.
    ///
    /// - Parameters:
    ///   - makeEngine: called on the new thread; the engine it returns belongs to that thread.
    /// - Throws: what `makeEngine` throws, or `exhausted` when no thread can be started.
    public init(
        name: String,
        engine makeEngine: @escaping @Sendable () throws(BlockError) -> any IOEngine = {
            () throws(BlockError) in try EngineChoice.fromEnvironment().makeEngine()
        }
    ) throws(BlockError) {
        self.name = name
        ready.reserveCapacity(256)
        running.reserveCapacity(256)
        let started = Latch<BlockError?>()
        let box = ThreadBody {
            self.thread = Self.currentThread()
            #if os(Linux)
            self.systemIdentifier = Int(linux_thread_identifier())
            #endif
            do throws(BlockError) {
                self.engineBox = try makeEngine()
            } catch {
                started.open(error)
                return
            }
            started.open(nil)
            self.loop()
        }
        try box.start(name: name)
        if let error = started.wait() { throw error }
    }

    // MARK: Running code

    /// Whether the caller runs on this thread.
    @inline(__always)
    public var isCurrent: Bool { pthread_equal(Self.currentThread(), thread) != 0 }

    /// Asks anew each time. glibc declares `pthread_self` as a function whose result is always the same, and so
    /// the optimiser keeps that beyond a suspension, after which a task may be on another thread.
    @inline(__always)
    private static func currentThread() -> pthread_t {
        #if os(Linux)
        pthread_t(linux_current_thread())
        #else
        pthread_self()
        #endif
    }

    /// Traps when the caller is not on this thread: the guard of confined objects.
    @inline(__always)
    public func preconditionOnThread() {
        precondition(isCurrent, "called outside its IOThread")
    }

    /// Starts a task here. On the thread itself the task begins at once, before `spawn` returns.
    @discardableResult
    public func spawn(_ body: sending @escaping @isolated(any) () async -> Void) -> Task<
        Void, Never
    > {
        start(body, isThere: isCurrent)
    }

    /// Runs `body` here and gives back what it returns or throws.
    public func run<T: Sendable>(
        _ body: @escaping @Sendable () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let result = await Task(executorPreference: self) { () async -> Result<T, BlockError> in
            do throws(BlockError) {
                return .success(try await body())
            } catch {
                return .failure(error)
            }
        }.value
        return try result.get()
    }

    /// Runs `body` here while the calling thread, which must be another, waits: for `main`.
    public func runBlocking<T: Sendable>(
        _ body: @escaping @Sendable () async throws(BlockError) -> T
    ) throws(BlockError) -> T {
        precondition(!isCurrent, "an IOThread cannot wait for itself")
        let done = Latch<Result<T, BlockError>>()
        spawn {
            do throws(BlockError) {
                done.open(.success(try await body()))
            } catch {
                done.open(.failure(error))
            }
        }
        return try done.wait().get()
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        enqueue(UnownedJob(job), of: nil)
    }

    @inline(__always)
    func enqueue(_ job: UnownedJob, of seat: IOSeat?) {
        let job = ReadyJob(job: job, seat: seat)
        if isCurrent {
            ready.append(job)
            return
        }
        let isOver = mailbox.withLock { mailbox in
            if !mailbox.isOver { mailbox.jobs.append(job) }
            return mailbox.isOver
        }
        if isOver { return forward(job) }
        mailboxIsFull.store(true, ordering: .sequentiallyConsistent)
        if isAsleep.load(ordering: .sequentiallyConsistent) { wakeEngine() }
    }

    /// Lets other ready jobs run first.
    public func yield() async {
        await Task.yield()
    }

    /// Ends the loop once the current turn is over. Tasks that still wait never resume: stop their
    /// work first. From any thread.
    public func stop() {
        mailbox.withLock { $0.isStopping = true }
        mailboxIsFull.store(true, ordering: .sequentiallyConsistent)
        wakeEngine()
    }

    /// Ends the loop once no operation is pending. Sleepers whose seat moved on go to sleep there; those
    /// that are still here never resume. From any thread.
    public func retire() {
        mailbox.withLock { $0.isRetiring = true }
        mailboxIsFull.store(true, ordering: .sequentiallyConsistent)
        wakeEngine()
    }

    /// Under the lock, because the thread lets go of its engine when it ends.
    private func wakeEngine() {
        mailbox.withLock { _ in engineBox?.wake() }
    }

    // MARK: Operations

    /// The engine. On the thread only.
    @inline(__always)
    public var engine: any IOEngine {
        guard let engineBox else { preconditionFailure("the thread has no engine yet") }
        return engineBox
    }

    /// The calls that may block.
    public var system: any IOSystem { engine.system }

    /// Submits `operation` and waits for it. On the thread only.
    ///
    /// - Returns: bytes, a handle or 0, or the negative `errno` value.
    public func perform(_ operation: IOOperation) async -> Int {
        await withUnsafeContinuation { continuation in
            let token = pending.insert(continuation, operation)
            TracePoint.ioSubmit("token \(token.rawValue) \(operation.summary)")
            engine.submit(operation, token)
        }
    }

    /// ``perform(_:)`` for a long transfer through the page cache: on another processor.
    func performAside(_ operation: IOOperation) async -> Int {
        await withUnsafeContinuation { continuation in
            let token = pending.insert(continuation, operation)
            engine.submitAside(operation, token)
        }
    }

    /// Runs blocking or CPU-heavy `work` on a worker thread and comes back with its result.
    public func offload<T: Sendable>(_ work: @escaping @Sendable () -> T) async -> T {
        if !engine.offloadsWork { return work() }
        return await withUnsafeContinuation { continuation in
            workers.submit { continuation.resume(returning: work()) }
        }
    }

    /// ``offload(_:)`` for work that can fail.
    public func offload<T: Sendable>(
        throwing work: @escaping @Sendable () throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        try await offload { () -> Result<T, BlockError> in
            do throws(BlockError) {
                return .success(try work())
            } catch {
                return .failure(error)
            }
        }.get()
    }

    /// What its engine goes by. On the thread only.
    public var tuning = EngineTuning() {
        didSet { engine.tune(tuning) }
    }

    /// Who does what would stall it. On the thread only.
    public var workers = WorkerPool.shared {
        didSet { engine.useWorkers(of: workers) }
    }

    /// Calls `hook` once at the end of this turn. On the thread only.
    public func atEndOfTurn(_ hook: any EndOfTurnHook) {
        hooks.append(hook)
    }

    /// Nanoseconds of the engine's clock, which only goes forward.
    public var now: UInt64 { engine.now }

    // MARK: The loop

    private func loop() {
        let executor = asUnownedTaskExecutor()
        while true {
            if mailboxIsFull.load(ordering: .relaxed), !takeMail() { break }
            if isRetiring, pending.isEmpty, ready.isEmpty { break }
            swap(&ready, &running)
            for job in running { run(job, executor) }
            running.removeAll(keepingCapacity: true)
            runHooks()
            timers.fire(now: timers.isEmpty ? 0 : engine.now)
            poll()
        }
        let late = mailbox.withLock { mailbox in
            engineBox = nil
            mailbox.isOver = true
            return mailbox.jobs
        }
        for job in late { forward(job) }
    }

    /// Hands on what reached this thread when the seat had moved.
    private func forward(_ ready: ReadyJob) {
        guard let seat = ready.seat else { return }
        let thread = seat.thread
        if thread !== self { thread.enqueue(ready.job, of: seat) }
    }

    private func run(_ ready: ReadyJob, _ executor: UnownedTaskExecutor) {
        guard let seat = ready.seat else { return ready.job.runSynchronously(on: executor) }
        // The seat moved after the job became ready.
        guard seat.thread === self else { return forward(ready) }
        ready.job.runSynchronously(on: seat.asUnownedTaskExecutor())
    }

    private func poll() {
        let engine = engine
        if !ready.isEmpty {
            engine.poll(deadline: 0) { complete($0, $1) }
            return
        }
        isAsleep.store(true, ordering: .sequentiallyConsistent)
        let hasMail = mailboxIsFull.load(ordering: .sequentiallyConsistent)
        engine.poll(deadline: hasMail ? 0 : timers.nextDeadline) { complete($0, $1) }
        isAsleep.store(false, ordering: .relaxed)
    }

    private func complete(_ token: IOToken, _ result: Int) {
        TracePoint.ioComplete("token \(token.rawValue) result \(result)")
        pending.remove(token)?.resume(returning: result)
    }

    private func runHooks() {
        // A hook may make another object ask for one: those run in this turn too.
        var index = 0
        while index < hooks.count {
            hooks[index].endOfTurn()
            index += 1
        }
        hooks.removeAll(keepingCapacity: true)
    }

    /// - Returns: `false` when the thread is to stop.
    private func takeMail() -> Bool {
        mailboxIsFull.store(false, ordering: .sequentiallyConsistent)
        return mailbox.withLock { mailbox in
            ready.append(contentsOf: mailbox.jobs)
            mailbox.jobs.removeAll(keepingCapacity: true)
            if mailbox.isRetiring, !isRetiring {
                isRetiring = true
                timers.evict()
            }
            return !mailbox.isStopping
        }
    }
}

/// Something that gathers work over a turn and does it at the end.
public protocol EndOfTurnHook: AnyObject {
    func endOfTurn()
}

/// The operations that an engine has not completed, by token.
private struct PendingTable {
    private struct Entry {
        var continuation: UnsafeContinuation<Int, Never>?
        /// Keeps the memory of the operation alive.
        var operation: IOOperation?
    }
    private var entries: [Entry] = []
    private var free: [UInt32] = []

    var isEmpty: Bool { free.count == entries.count }

    mutating func insert(
        _ continuation: UnsafeContinuation<Int, Never>, _ operation: IOOperation
    ) -> IOToken {
        if let index = free.popLast() {
            entries[Int(index)].continuation = continuation
            entries[Int(index)].operation = operation
            return IOToken(index)
        }
        entries.append(Entry(continuation: continuation, operation: operation))
        return IOToken(UInt32(entries.count - 1))
    }

    mutating func remove(_ token: IOToken) -> UnsafeContinuation<Int, Never>? {
        let index = Int(token.rawValue)
        guard index < entries.count, let continuation = entries[index].continuation else {
            preconditionFailure("an engine completed an operation twice")
        }
        entries[index].continuation = nil
        entries[index].operation = nil
        free.append(token.rawValue)
        return continuation
    }
}
