import BlockCore

/// What was done to a file and is not known to be on stable storage.
enum FileChange: Sendable {
    case write(offset: Int, bytes: [UInt8])
    case zero(ByteRange, reserving: Bool, grows: Bool)
    case reserve(ByteRange)
    case setSize(Int)

    func apply(to content: inout SparseBytes) {
        switch self {
        case .write(let offset, let bytes):
            bytes.withUnsafeBytes { content.write(offset, $0) }
        case .zero(let range, let reserving, let grows):
            if grows { content.grow(to: range.end) }
            // Past its end a file has nothing to zero.
            if let part = range.intersection(ByteRange(0, content.size)) {
                content.zero(part, reserving: reserving)
            }
        case .reserve(let range):
            content.grow(to: range.end)
            content.reserve(range)
        case .setSize(let size): content.setSize(size)
        }
    }

    /// The bytes that it changes.
    var range: ByteRange? {
        switch self {
        case .write(let offset, let bytes): ByteRange(offset, bytes.count)
        case .zero(let range, _, _): range
        case .reserve, .setSize: nil
        }
    }

    /// The change cut at multiples of `unit`, where the medium may tear it.
    func pieces(unit: Int) -> [FileChange] {
        switch self {
        case .write(let offset, let bytes):
            return Self.cut(ByteRange(offset, bytes.count), unit).map { part in
                let start = part.offset - offset
                return .write(
                    offset: part.offset, bytes: Array(bytes[start..<(start + part.count)]))
            }
        case .zero(let range, let reserving, let grows):
            return Self.cut(range, unit).map { .zero($0, reserving: reserving, grows: grows) }
        case .reserve, .setSize: return [self]
        }
    }

    private static func cut(_ range: ByteRange, _ unit: Int) -> [ByteRange] {
        var result: [ByteRange] = []
        var offset = range.offset
        while offset < range.end {
            // No more than a few thousand pieces of a very large range.
            let step = max(unit, (range.count / 2048).roundedDown(to: unit))
            let end = min((offset + step).roundedDown(to: unit), range.end)
            result.append(ByteRange(from: offset, to: max(end, min(offset + 1, range.end))))
            offset = result[result.count - 1].end
        }
        return result
    }
}

/// One file of a simulated disk, whatever its name: what programs see, and what would be there after
/// a crash.
///
/// Invariants:
/// 1. `durable` with all of `log` applied in order is `current`, unless a failed synchronisation
///    dropped changes.
/// 2. A change leaves `log` only into `durable`, or by being lost for good.
final class SimulatedFile {
    let number: UInt64
    private(set) var current = SparseBytes()
    private(set) var durable = SparseBytes()
    private var log: [(change: FileChange, mustSurvive: Bool, isPassing: Bool)] = []
    /// How many changes left the log before those in it.
    private var logStart = 0
    /// No handle: somebody else has the lock.
    static let unseenHolder: IOHandleNumber = -1
    var locks: [(holder: IOHandleNumber, range: ByteRange, isExclusive: Bool)] = []

    init(number: UInt64) {
        self.number = number
    }

    /// Names the end of the log: what a synchronisation that begins now covers.
    var position: Int { logStart + log.count }

    /// - Parameters:
    ///   - mustSurvive: on stable storage at once (a durable write).
    ///   - isPassing: a sector that is being filled: by itself it does not reach the medium.
    func change(_ change: FileChange, mustSurvive: Bool = false, isPassing: Bool = false) {
        change.apply(to: &current)
        log.append((change, mustSurvive, isPassing))
    }

    /// Everything before `position` is on stable storage.
    func synchronize(upTo position: Int) {
        let count = min(max(position - logStart, 0), log.count)
        for entry in log.prefix(count) { entry.change.apply(to: &durable) }
        log.removeFirst(count)
        logStart += count
    }

    /// A synchronisation failed: what it covered may have reached the medium or not, and will not be
    /// tried again. Programs go on seeing it until the machine goes down.
    func failSynchronization(upTo position: Int, _ random: inout SeededRandom) {
        let count = min(max(position - logStart, 0), log.count)
        for entry in log.prefix(count) where entry.mustSurvive || random.chance(500) {
            entry.change.apply(to: &durable)
        }
        log.removeFirst(count)
        logStart += count
    }

    /// The file as it may be found after the power went away at this moment.
    func survivor(_ losses: CrashLosses, _ random: inout SeededRandom) -> SimulatedFile {
        let unit = losses.tearUnit ?? (random.chance(500) ? 512 : 4096)
        var content = durable
        var seen = durable
        for (change, mustSurvive, isPassing) in log {
            change.apply(to: &seen)
            if isPassing { continue }
            switch mustSurvive ? .kept : losses.fate(&random) {
            case .kept: Self.keep(change, of: seen, in: &content)
            case .dropped: break
            case .torn:
                for piece in change.pieces(unit: unit) where random.chance(500) {
                    Self.keep(piece, of: seen, in: &content)
                }
            }
        }
        return Self(number: number, holding: content)
    }

    private static let sectorSize = 512

    /// Applies a change to what survives. A sector is written whole, as programs saw it after the change:
    /// where a change ends within one, earlier changes of that sector survive with it.
    private static func keep(
        _ change: FileChange, of seen: SparseBytes, in content: inout SparseBytes
    ) {
        change.apply(to: &content)
        guard let range = change.range, range.count > 0 else { return }
        for edge in [range.offset, range.end] where !edge.isAligned(to: sectorSize) {
            let start = edge.roundedDown(to: sectorSize)
            let count = min(sectorSize, max(0, seen.size - start))
            seen.bytes(ByteRange(start, count)).withUnsafeBytes { content.write(start, $0) }
        }
    }

    private init(number: UInt64, holding content: SparseBytes) {
        self.number = number
        current = content
        durable = content
    }

    /// A file that holds `content`, all of it on stable storage.
    convenience init(number: UInt64, content: SparseBytes) {
        self.init(number: number, holding: content)
    }

    /// The same file for another disk, unsynchronised changes included.
    func copy() -> SimulatedFile {
        let copy = SimulatedFile(number: number)
        copy.current = current
        copy.durable = durable
        copy.log = log
        copy.logStart = logStart
        return copy
    }
}

typealias IOHandleNumber = Int32

/// What a crash does to changes that were not synchronised.
public struct CrashLosses: Sendable {
    enum Fate { case kept, dropped, torn }

    /// In 1000 changes.
    public var keptPerMille: Int
    public var tornPerMille: Int
    /// Torn changes are cut at multiples of this: 512 or 4096; `nil` picks one by chance.
    public var tearUnit: Int?

    public init(keptPerMille: Int = 400, tornPerMille: Int = 250, tearUnit: Int? = nil) {
        self.keptPerMille = keptPerMille
        self.tornPerMille = tornPerMille
        self.tearUnit = tearUnit
    }

    /// Everything reaches the medium, as after the kill of a process on a machine that goes on.
    public static let none = CrashLosses(keptPerMille: 1000, tornPerMille: 0)
    /// Nothing reaches the medium that was not synchronised.
    public static let everything = CrashLosses(keptPerMille: 0, tornPerMille: 0)
    /// Some reach it, some do not, some do in part.
    public static let mixed = CrashLosses()

    func fate(_ random: inout SeededRandom) -> Fate {
        let draw = random.below(1000)
        if draw < keptPerMille { return .kept }
        return draw < keptPerMille + tornPerMille ? .torn : .dropped
    }
}
