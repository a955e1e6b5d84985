import BlockCore

/// What an operation acts on: a file descriptor, or what stands for one in a simulated system.
public struct IOHandle: Hashable, Sendable {
    public let rawValue: Int32
    @inlinable public init(_ rawValue: Int32) { self.rawValue = rawValue }
}

/// How space is reserved, zeroed or given back: the modes of `fallocate(2)`.
public enum AllocationMode: Sendable {
    /// Reserve space; the file may grow.
    case allocate
    /// Make a hole; the size stays.
    case punchHole
    /// Make zeroes, keeping the space; the size stays.
    case zeroKeepingSpace
    /// Make zeroes, keeping the space; the file may grow.
    case zeroAndGrow
}

/// One asynchronous operation, as an engine takes it.
///
/// Every operation completes exactly once with a number: bytes, a handle or 0 where it worked, the
/// negative `errno` value where it did not. Memory and handles stay valid until then.
public enum IOOperation: Sendable {
    /// Reads at `offset`. May come short.
    case read(IOHandle, IOVector, offset: Int)
    /// Writes at `offset`. May come short. `durable`: on stable storage before it completes.
    case write(IOHandle, IOVector, offset: Int, durable: Bool)
    /// What was written before is on stable storage when this completes.
    case synchronize(IOHandle, dataOnly: Bool)
    case allocate(IOHandle, AllocationMode, ByteRange)
    /// Receives at least one byte; 0 is the end of the stream.
    case receive(IOHandle, IOVector)
    /// Sends. May come short. Never raises a signal.
    case send(IOHandle, IOVector)
    /// The next connection's handle, non-blocking and close-on-exec.
    case accept(IOHandle)
    case connect(IOHandle, SocketAddress)
    /// Completes with 0 when there is something to read.
    case awaitReadable(IOHandle)
    /// Completes with 0 when the peer has taken most of what was sent to it, or after so many
    /// nanoseconds. A hint, for who could do more work at once a little later: an engine may complete
    /// it at once.
    case awaitTaken(IOHandle, nanosecondsMax: UInt64)
}

/// Names one submitted operation within its thread.
public struct IOToken: Hashable, Sendable {
    public let rawValue: UInt32
    @inlinable public init(_ rawValue: UInt32) { self.rawValue = rawValue }
}

/// Executes operations for one ``IOThread``: io_uring, worker threads with `poll`, or a simulation.
///
/// Thread rule: all methods but ``wake()`` are called on the thread that created the engine.
/// Completion-based throughout, so that a completion port fits too.
public protocol IOEngine: AnyObject {
    /// As `MERINO_IO_ENGINE` and reports name it.
    var name: String { get }

    /// Blocking calls: opening, sizes, locks, listening.
    var system: any IOSystem { get }

    /// Nanoseconds of a clock that only goes forward.
    var now: UInt64 { get }

    /// Whether ``IOThread/offload(_:)`` runs work on other threads. A simulation runs it in place.
    var offloadsWork: Bool { get }

    /// Starts `operation`. It may be held until the next ``poll(deadline:complete:)``.
    func submit(_ operation: IOOperation, _ token: IOToken)

    /// ``submit(_:_:)`` for a long transfer through the page cache: the copying is done on another
    /// processor where the engine can, so that several run at the same time.
    func submitAside(_ operation: IOOperation, _ token: IOToken)

    /// Makes every operation on `handle` complete soon, with `-ECANCELED` where it had no effect yet.
    func cancelAll(on handle: IOHandle)

    /// Starts all that is held and delivers completions.
    ///
    /// - Parameter deadline: wait for a completion or ``wake()`` until then (on ``now``'s clock);
    ///   0 does not wait; `nil` waits for as long as it takes.
    func poll(deadline: UInt64?, complete: (IOToken, Int) -> Void)

    /// Goes on as `tuning` says, where that means something to the engine.
    func tune(_ tuning: EngineTuning)

    /// Has what it leaves to other threads done by those of `pool` from now on.
    func useWorkers(of pool: WorkerPool)

    /// Ends a wait in ``poll(deadline:complete:)``, the current or the next one. From any thread.
    func wake()

    /// Reads without waiting, where that is possible right now: from the page cache.
    /// `nil`: submit the operation instead.
    func readNow(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int?

    /// Writes at once. `nil`: submit instead.
    ///
    /// - Parameter mayWait: it may take as long as a buffered write does; without, a file that would have
    ///   to wait gives `nil`, and one that cannot tell `-EOPNOTSUPP` or `-EINVAL`.
    func writeNow(
        _ handle: IOHandle, _ vector: IOVector, offset: Int, mayWait: Bool
    ) -> Int?

    /// Receives what is there. `nil`: nothing is, or submit instead.
    func receiveNow(_ handle: IOHandle, _ vector: IOVector) -> Int?

    /// Sends what fits. `nil`: nothing does, or submit instead.
    func sendNow(_ handle: IOHandle, _ vector: IOVector) -> Int?
}

extension IOEngine {
    public func submitAside(_ operation: IOOperation, _ token: IOToken) {
        submit(operation, token)
    }
    public func tune(_ tuning: EngineTuning) {}
    public func useWorkers(of pool: WorkerPool) {}
    public func readNow(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int? { nil }
    public func writeNow(
        _ handle: IOHandle, _ vector: IOVector, offset: Int, mayWait: Bool
    ) -> Int? { nil }
    public func receiveNow(_ handle: IOHandle, _ vector: IOVector) -> Int? { nil }
    public func sendNow(_ handle: IOHandle, _ vector: IOVector) -> Int? { nil }
}
