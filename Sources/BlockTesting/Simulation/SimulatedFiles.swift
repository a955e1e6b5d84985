import BlockCore
import BlockIO

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A file as one `open` sees it.
final class OpenFile {
    let path: String
    let file: SimulatedFile
    let options: FileOptions

    init(path: String, file: SimulatedFile, options: FileOptions) {
        self.path = path
        self.file = file
        self.options = options
    }
}

/// The open files of a running machine. Handles are never used twice.
final class SimulatedFiles {
    let simulation: Simulation
    private var open: [IOHandle: OpenFile] = [:]
    var lastHandle: Int32 = 2
    var isDown = false

    init(_ simulation: Simulation) {
        self.simulation = simulation
    }

    subscript(handle: IOHandle) -> OpenFile? { isDown ? nil : open[handle] }

    func add(_ file: OpenFile) -> IOHandle {
        let handle = nextHandle()
        open[handle] = file
        return handle
    }

    func nextHandle() -> IOHandle {
        lastHandle += 1
        return IOHandle(lastHandle)
    }

    /// - Returns: whether it was a file.
    func close(_ handle: IOHandle) -> Bool {
        guard let file = open.removeValue(forKey: handle) else { return false }
        file.file.locks.removeAll { $0.holder == handle.rawValue }
        return true
    }
}

/// One file operation while it is carried out.
final class FileService {
    private let operation: IOOperation
    private let open: OpenFile
    /// Of a synchronisation: the changes that were made before it was asked for.
    private let position: Int
    /// Bytes to move; 0 for operations that move none.
    private(set) var count: Int
    private var done = 0
    private var failure = 0

    init(_ operation: IOOperation, _ open: OpenFile, coveredBy position: Int) {
        self.operation = operation
        self.open = open
        self.position = position
        switch operation {
        case .read(_, let vector, _), .write(_, let vector, _, _): count = vector.count
        default: count = 0
        }
    }

    var isSynchronization: Bool {
        if case .synchronize = operation { return true }
        return false
    }

    /// Decides whether the operation comes short.
    func cut(_ simulation: Simulation) {
        guard count > 1, simulation.random.chance(simulation.options.shortPerMille) else { return }
        let short = 1 + simulation.random.below(count - 1)
        // Past the page cache a device moves whole sectors.
        count = open.options.direct ? max(short.roundedDown(to: 512), min(count, 512)) : short
    }

    var canSplit: Bool { count > 512 }

    /// Where the second step begins: a multiple of 512 in the file.
    func split(_ random: inout SeededRandom) -> Int {
        let offset = operation.range?.offset ?? 0
        let position = offset + 1 + random.below(count - 1)
        return max(position.roundedDown(to: 512) - offset, 0)
    }

    /// Carries out the part of the operation from `start` to `end`, which follows on the part before.
    ///
    /// - Returns: what the operation completes with if this was the last part.
    @discardableResult
    func run(_ simulation: Simulation, _ start: Int, _ end: Int) -> Int {
        switch operation {
        case .read(_, let vector, let offset): read(vector, offset, start, end)
        case .write(_, let vector, let offset, let durable):
            write(simulation, vector, offset, start, end, durable)
        case .synchronize:
            open.file.synchronize(upTo: position)
            simulation.disk.commitName(of: open.file)
        case .allocate(_, let mode, let range): allocate(simulation, mode, range)
        default: failure = -Int(EINVAL)
        }
        simulation.note(
            "file \(operation.kindAndHandle.0)", Int(open.file.number),
            operation.range?.offset ?? 0, start, end, failure, done)
        return done > 0 ? done : failure
    }

    private func isMisaligned(_ vector: IOVector, _ offset: Int) -> Bool {
        guard open.options.direct else { return false }
        var isWhole = (offset | vector.count).isAligned(to: 512)
        vector.forEachSegment { segment in
            let address = Int(bitPattern: segment.bytes.baseAddress)
            isWhole = isWhole && (address | segment.count).isAligned(to: 512)
        }
        return !isWhole
    }

    private func read(_ vector: IOVector, _ offset: Int, _ start: Int, _ end: Int) {
        guard !isMisaligned(vector, offset) else { return failure = -Int(EINVAL) }
        guard done == start else { return }
        let available = min(max(open.file.current.size - offset - start, 0), end - start)
        vector.slice(start, available).copy(
            from: open.file.current.bytes(ByteRange(offset + start, available)))
        done += available
    }

    private func write(
        _ simulation: Simulation, _ vector: IOVector, _ offset: Int, _ start: Int, _ end: Int,
        _ durable: Bool
    ) {
        guard open.options.writable else { return failure = -Int(EBADF) }
        guard !isMisaligned(vector, offset) else { return failure = -Int(EINVAL) }
        guard done == start, end > start else { return }
        let fitting = simulation.disk.room(
            for: ByteRange(offset + start, end - start), in: open.file)
        if fitting == 0 { return failure = -Int(ENOSPC) }
        // A write that comes short within a sector goes on there: the medium gets the sector then.
        let reached = offset + start + fitting
        let isCut = !durable && start + fitting < vector.count
        let whole = isCut ? max(reached.roundedDown(to: 512) - offset - start, 0) : fitting
        for (from, count) in [(start, whole), (start + whole, fitting - whole)] where count > 0 {
            open.file.change(
                .write(offset: offset + from, bytes: vector.slice(from, count).array),
                mustSurvive: durable, isPassing: from > start || whole == 0)
        }
        if durable { simulation.disk.commitName(of: open.file) }
        done += fitting
    }

    private func allocate(_ simulation: Simulation, _ mode: AllocationMode, _ range: ByteRange) {
        guard open.options.writable else { return failure = -Int(EBADF) }
        guard !range.isEmpty else { return failure = -Int(EINVAL) }
        if case .punchHole = mode {
            open.file.change(.zero(range, reserving: false, grows: false))
            return
        }
        guard simulation.disk.room(for: range, in: open.file) == range.count else {
            return failure = -Int(ENOSPC)
        }
        switch mode {
        case .allocate, .punchHole: open.file.change(.reserve(range))
        case .zeroKeepingSpace: open.file.change(.zero(range, reserving: true, grows: false))
        case .zeroAndGrow: open.file.change(.zero(range, reserving: true, grows: true))
        }
    }

    /// A fault struck: a write may have written its start, a synchronisation may have lost what it
    /// was for.
    func fail(_ simulation: Simulation) {
        switch operation {
        case .write(_, let vector, let offset, _):
            let part = simulation.random.below(vector.count + 1)
            write(simulation, vector, offset, 0, part, false)
        case .synchronize:
            open.file.failSynchronization(upTo: position, &simulation.random)
        default: break
        }
        simulation.note("fault \(operation.kindAndHandle.0)", Int(open.file.number))
    }
}

extension IOVector {
    /// Copies an array's bytes to the start of this memory. Traps when they do not fit.
    func copy(from bytes: [UInt8]) {
        bytes.withUnsafeBytes { copy(from: $0) }
    }
}
