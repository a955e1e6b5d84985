import BlockCore
import BlockIO
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The engine of a simulated machine: operations take effect and complete at times of a virtual
/// clock, which jumps to the next thing to happen when nothing is ready.
///
/// Invariants:
/// 1. The clock moves by what happens on the engine's thread only: not by time outside, and not by
///    wake-ups from other threads.
/// 2. Once down, nothing completes and nothing reaches the disk.
final class SimulatedEngine: IOEngine {
    enum Stop {
        case crashed
        /// With what it may be waiting for.
        case stuck(String)
    }

    /// What a turn of the loop costs: so that waiting by yielding ends, too.
    private static let turnNanoseconds: UInt64 = 200

    /// Turns in a row in which no operation gets on, after which a boot counts as stuck.
    private static let idleTurnsMax = 1_000_000

    let simulation: Simulation
    let files: SimulatedFiles
    let network: SimulatedNetwork
    private let machine: SimulatedSystem
    private var events = EventQueue()
    private var completed: [(IOToken, Int)] = []
    private var hung: [(handle: IOHandle, token: IOToken, release: () -> Void)] = []
    private var onStop: ((Stop) -> Void)?
    private var isRunning = false
    private(set) var isDown = false
    private var idleTurns = 0
    private let alarm = Alarm()

    let name = "simulation"
    let offloadsWork = false
    private(set) var now: UInt64 = 1_000_000_000
    var system: any IOSystem { machine }
    var hungCount: Int { hung.count }

    init(_ simulation: Simulation) {
        self.simulation = simulation
        files = SimulatedFiles(simulation)
        network = SimulatedNetwork(simulation, files)
        machine = SimulatedSystem(simulation, files, network)
        network.engine = self
    }

    /// The boot's body begins.
    func start(onStop: @escaping (Stop) -> Void) {
        self.onStop = onStop
        isRunning = true
        if let time = simulation.options.crashNanoseconds {
            events.add(at: now &+ time) { [unowned self] in crash() }
        }
    }

    /// The boot's body ended: what is still in flight stays where it is.
    func bodyEnded() {
        guard !isDown else { return }
        simulation.note("end", Int(now))
        goDown()
    }

    private func goDown() {
        isRunning = false
        isDown = true
        files.isDown = true
        events.removeAll()
        completed = []
        hung = []
    }

    // MARK: Submitting

    func submit(_ operation: IOOperation, _ token: IOToken) {
        if isDown { return }
        switch operation {
        case .read, .write, .synchronize, .allocate: submitFile(operation, token)
        default: submitSocket(operation, token)
        }
    }

    private func submitSocket(_ operation: IOOperation, _ token: IOToken) {
        let (kind, handle) = operation.kindAndHandle
        let begin = { [unowned self] in network.submit(operation, token) }
        switch simulation.strike(kind, nil, nil) {
        case .fail(let error): complete(token, -Int(error), after: draw(\.socketNanoseconds))
        case .hang: hung.append((handle, token, begin))
        case .delay(let time): at(time, begin)
        case .crash: crash()
        case nil: begin()
        }
    }

    private func submitFile(_ operation: IOOperation, _ token: IOToken) {
        let (kind, handle) = operation.kindAndHandle
        guard let open = files[handle] else { return complete(token, -Int(EBADF), after: 0) }
        let service = FileService(operation, open, coveredBy: open.file.position)
        let begin = { [unowned self] (time: UInt64) in self.begin(service, token, after: time) }
        switch simulation.strike(kind, open.path, operation.range) {
        case .fail(let error):
            let time = draw(\.fileNanoseconds)
            at(time) { [unowned self] in
                service.fail(simulation)
                complete(token, -Int(error), after: 0)
            }
        case .hang: hung.append((handle, token, { begin(0) }))
        case .delay(let time): begin(time)
        case .crash: crash()
        case nil: begin(0)
        }
    }

    /// Carries a file operation out in one or two steps, then completes it.
    private func begin(_ service: FileService, _ token: IOToken, after delay: UInt64) {
        let time =
            delay &+ draw(service.isSynchronization ? \.synchronizeNanoseconds : \.fileNanoseconds)
        service.cut(simulation)
        if service.canSplit, simulation.random.chance(simulation.options.splitPerMille) {
            let split = service.split(&simulation.random)
            at(time / 3) { [unowned self] in service.run(simulation, 0, split) }
            at(time * 2 / 3) { [unowned self] in
                complete(token, service.run(simulation, split, service.count), after: time / 3)
            }
            return
        }
        at(time / 2) { [unowned self] in
            complete(token, service.run(simulation, 0, service.count), after: time - time / 2)
        }
    }

    func draw(_ range: KeyPath<SimulationOptions, ClosedRange<Int>>) -> UInt64 {
        UInt64(simulation.random.between(simulation.options[keyPath: range]))
    }

    /// Does something later.
    func at(_ nanoseconds: UInt64, _ action: @escaping () -> Void) {
        events.add(at: now &+ nanoseconds, action)
    }

    func complete(_ token: IOToken, _ result: Int, after nanoseconds: UInt64) {
        at(nanoseconds) { [unowned self] in
            simulation.note("complete", Int(token.rawValue), result, Int(now))
            completed.append((token, result))
        }
    }

    func cancelAll(on handle: IOHandle) {
        if isDown { return }
        network.cancelAll(on: handle)
        for entry in hung where entry.handle == handle {
            complete(entry.token, -Int(ECANCELED), after: 0)
        }
        hung.removeAll { $0.handle == handle }
    }

    func releaseHung() {
        let released = hung
        hung = []
        for entry in released { entry.release() }
    }

    func crash() {
        guard !isDown else { return }
        simulation.note("crash", Int(now))
        goDown()
        simulation.disk.crash(simulation.options.losses, using: &simulation.random)
        onStop?(.crashed)
    }

    // MARK: Completing

    func poll(deadline: UInt64?, complete: (IOToken, Int) -> Void) {
        guard isRunning else {
            if deadline != 0 { alarm.wait(seconds: nil) }
            return
        }
        switch deadline {
        case 0: now &+= Self.turnNanoseconds
        case let deadline:
            // Nothing is ready: on to what comes next.
            guard let next = [events.nextTime, deadline].compactMap({ $0 }).min() else {
                if !alarm.wait(seconds: simulation.options.stuckSeconds) {
                    onStop?(.stuck(waitingFor))
                }
                return
            }
            now = max(now, next)
        }
        idleTurns += 1
        while let action = events.next(until: now) {
            idleTurns = 0
            action()
        }
        if idleTurns > Self.idleTurnsMax { return stopTurning() }
        let done = completed
        completed.removeAll(keepingCapacity: true)
        for (token, result) in done { complete(token, result) }
    }

    /// Something waits in a loop, by yielding or sleeping, for what will never come.
    private func stopTurning() {
        let why = waitingFor
        goDown()
        onStop?(.stuck(why))
    }

    private var waitingFor: String {
        let parts = [hung.isEmpty ? nil : "\(hung.count) operations hang", network.waitingFor]
        let text = parts.compactMap { $0 }.joined(separator: ", ")
        return text.isEmpty ? "" : ": \(text)"
    }

    func wake() {
        alarm.ring()
    }

    // MARK: At once

    private func isImmediate(
        _ kind: SimulatedOperation, _ path: String?, _ range: ByteRange?
    ) -> Bool {
        !isDown && simulation.random.chance(simulation.options.immediatePerMille)
            && !simulation.mayStrike(kind, path, range)
    }

    func readNow(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int? {
        atOnce(.read(handle, vector, offset: offset))
    }

    func writeNow(
        _ handle: IOHandle, _ vector: IOVector, offset: Int, mayWait: Bool
    ) -> Int? {
        atOnce(.write(handle, vector, offset: offset, durable: false))
    }

    private func atOnce(_ operation: IOOperation) -> Int? {
        let (kind, handle) = operation.kindAndHandle
        guard let open = files[handle], isImmediate(kind, open.path, operation.range) else {
            return nil
        }
        let service = FileService(operation, open, coveredBy: 0)
        service.cut(simulation)
        return service.run(simulation, 0, service.count)
    }

    func receiveNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        isImmediate(.receive, nil, nil) ? network.receiveNow(handle, vector) : nil
    }

    func sendNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        isImmediate(.send, nil, nil) ? network.sendNow(handle, vector) : nil
    }
}

/// What ends a wait of the engine from another thread.
private final class Alarm: Sendable {
    private let monitor = Monitor<Bool>(false)

    func ring() {
        monitor.withLock { $0 = true }
        monitor.signal()
    }

    /// - Returns: `false` when it did not ring for that long.
    @discardableResult
    func wait(seconds: Int?) -> Bool {
        let rang: Void? = monitor.wait(seconds: seconds) { rings in
            defer { rings = false }
            return rings ? () : nil
        }
        return rang != nil
    }
}

extension IOOperation {
    var kindAndHandle: (SimulatedOperation, IOHandle) {
        switch self {
        case .read(let handle, _, _): (.read, handle)
        case .write(let handle, _, _, _): (.write, handle)
        case .synchronize(let handle, _): (.synchronize, handle)
        case .allocate(let handle, _, _): (.allocate, handle)
        case .receive(let handle, _), .awaitReadable(let handle): (.receive, handle)
        case .send(let handle, _), .awaitTaken(let handle, _): (.send, handle)
        case .accept(let handle): (.accept, handle)
        case .connect(let handle, _): (.connect, handle)
        }
    }

    /// The bytes of the file that it touches.
    var range: ByteRange? {
        switch self {
        case .read(_, let vector, let offset), .write(_, let vector, let offset, _):
            ByteRange(offset, vector.count)
        case .allocate(_, _, let range): range
        default: nil
        }
    }
}
