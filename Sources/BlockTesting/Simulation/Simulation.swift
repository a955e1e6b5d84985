import BlockCore
import BlockIO
import Synchronization

/// A machine with a disk, a network and a clock of its own, all of whose chance comes from one seed.
///
///     let simulation = Simulation(seed: 42)
///     simulation.disk.addFile("/disk.img", size: 1 << 20)
///     let outcome = try await simulation.boot { thread throws(BlockError) in
///         let file = try await File.open("/disk.img", FileOptions(writable: true), on: thread)
///         …
///     }
///
/// The same seed gives the same run: the same results in the same order, the same ``traceHash``, as
/// long as the code under test takes no chance, time or thread from outside.
///
/// The machine may go down in the middle of a boot: by ``crash()``, a fault rule or a time. The next
/// boot finds what survived on ``disk``.
///
/// Thread rule: while a boot runs, confined to its ``IOThread``; otherwise to whoever holds it.
public final class Simulation: @unchecked Sendable {
    public let seed: UInt64
    public var options: SimulationOptions
    public let disk: SimulatedDisk
    /// Looked at in order, for each operation; the first that strikes decides.
    public var faults: [FaultRule] = []
    /// Grows with everything that happens: two runs with the same hash were the same.
    public private(set) var traceHash: UInt64 = 0xcbf2_9ce4_8422_2325
    /// Lines, with ``SimulationOptions/recordsTrace``.
    public private(set) var trace: [String] = []
    /// How often the machine was started.
    public private(set) var bootCount = 0
    /// How many operations it has carried out.
    public private(set) var operationCount = 0

    var random: SeededRandom
    private var engine: SimulatedEngine?

    public init(seed: UInt64, _ options: SimulationOptions = SimulationOptions()) {
        self.seed = seed
        self.options = options
        random = SeededRandom(seed: seed)
        disk = SimulatedDisk()
    }

    /// How a boot ended.
    public enum Outcome<T: Sendable>: Sendable {
        case finished(T)
        case crashed
    }

    /// Starts the machine and runs `body` on its thread, until it ends or the machine goes down.
    ///
    /// - Throws: what `body` throws; `timedOut` when nothing can happen any more although `body` has
    ///   not ended.
    public func boot<T: Sendable>(
        _ body: @escaping @Sendable (IOThread) async throws(BlockError) -> T
    ) async throws(BlockError) -> Outcome<T> {
        bootCount += 1
        let thread = try IOThread(name: "simulation") { () throws(BlockError) in
            SimulatedEngine(self)
        }
        defer { thread.stop() }
        let ending = Ending<T>()
        let result = await withUnsafeContinuation {
            (continuation: UnsafeContinuation<Result<Outcome<T>, BlockError>, Never>) in
            ending.expect(continuation)
            thread.spawn {
                guard let engine = thread.engine as? SimulatedEngine else { return }
                self.engine = engine
                engine.start { stop in
                    switch stop {
                    case .crashed: ending.end(.success(.crashed))
                    case .stuck(let why):
                        ending.end(
                            .failure(
                                BlockError(
                                    .timedOut,
                                    "nothing can happen any more, and the simulation of seed "
                                        + "\(self.seed) has not ended\(why)")))
                    }
                }
                let result: Result<Outcome<T>, BlockError>
                do throws(BlockError) {
                    result = .success(.finished(try await body(thread)))
                } catch {
                    result = .failure(error)
                }
                // First, so that whoever is told finds everything at rest.
                engine.bodyEnded()
                ending.end(result)
            }
        }
        engine = nil
        return try result.get()
    }

    /// ``boot(_:)`` for a body in which the machine does not go down.
    ///
    /// - Throws: also `disconnected` when it does.
    public func run<T: Sendable>(
        _ body: @escaping @Sendable (IOThread) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        switch try await boot(body) {
        case .finished(let value): return value
        case .crashed:
            throw BlockError(.disconnected, "the simulated machine of seed \(seed) went down")
        }
    }

    /// The machine goes down at once: nothing that is in flight completes, what was not synchronised
    /// is kept, dropped or torn. Code that runs right now goes on until it waits for something.
    public func crash() {
        engine?.crash()
    }

    /// Lets operations that a fault rule hung go on.
    public func releaseHung() {
        engine?.releaseHung()
    }

    /// How many operations a fault rule holds.
    public var hungCount: Int { engine?.hungCount ?? 0 }

    // MARK: For the engine

    func note(_ event: String, _ numbers: Int...) {
        for byte in event.utf8 { mix(UInt64(byte)) }
        for number in numbers { mix(UInt64(bitPattern: Int64(number))) }
        if options.recordsTrace {
            let time = engine?.now ?? 0
            trace.append("\(time) \(event) \(numbers.map(String.init).joined(separator: " "))")
        }
    }

    private func mix(_ value: UInt64) {
        traceHash = (traceHash ^ value) &* 0x0000_0100_0000_01b3
        traceHash ^= traceHash >> 29
    }

    func strike(
        _ operation: SimulatedOperation, _ path: String?, _ range: ByteRange?
    ) -> FaultRule.Effect? {
        operationCount += 1
        for index in faults.indices where faults[index].matches(operation, path, range) {
            if let effect = faults[index].strike(&random) { return effect }
        }
        return nil
    }

    /// Whether a rule may have a say: then the operation takes the long way.
    func mayStrike(_ operation: SimulatedOperation, _ path: String?, _ range: ByteRange?) -> Bool {
        faults.contains { $0.matches(operation, path, range) }
    }
}

/// Resumes a continuation once, whoever is first.
private final class Ending<T: Sendable>: Sendable {
    private typealias Continuation = UnsafeContinuation<
        Result<Simulation.Outcome<T>, BlockError>, Never
    >
    private let continuation = Mutex<Continuation?>(nil)

    func expect(
        _ expected: UnsafeContinuation<Result<Simulation.Outcome<T>, BlockError>, Never>
    ) {
        continuation.withLock { $0 = expected }
    }

    func end(_ result: Result<Simulation.Outcome<T>, BlockError>) {
        let waiting = continuation.withLock { value -> Continuation? in
            defer { value = nil }
            return value
        }
        waiting?.resume(returning: result)
    }
}
