import BlockCore
import BlockGraph

/// The log of `blklogwrites`, as Linux's `dm-log-writes` and its tools lay it out; little-endian.
///
///     sector 0    super block   magic u64 · version u64 · entry count u64 · sector size u32
///     sector 1…   entries       sector u64 · sector count u64 · flags u64 · data length u64,
///                               in a sector of its own, and the data behind it, unless it is a discard
///
/// Invariants:
/// 1. Entries are appended one at a time (`locks`), in the order in which their requests completed.
/// 2. The super block counts entries only that are written.
final class WriteLog {
    struct Flags: OptionSet {
        let rawValue: UInt64
        static let flush = Flags(rawValue: 1)
        static let fua = Flags(rawValue: 2)
        static let discard = Flags(rawValue: 4)
        static let mark = Flags(rawValue: 8)
        static let known: Flags = [.flush, .fua, .discard, .mark]
    }

    /// What an entry has behind it.
    enum Payload {
        case none
        case data(IOVector)
        case zeroes
    }

    static let magic: UInt64 = 0x6a_7366_7773_6872
    static let version: UInt64 = 1
    static let sectorSizes = 32..<(1 << 24)

    private let edge: Edge
    let sectorSize: Int
    /// The super block is written after this many entries, and with every flush.
    private let updateInterval: Int
    private let locks = RangeLocks()
    /// Where the next entry goes, in bytes.
    private var end: Int
    private(set) var entryCount = 0
    /// How many of them the super block on disk counts.
    private var countedCount = 0

    /// Begins an empty log.
    init(_ edge: Edge, sectorSize: Int, updateInterval: Int) {
        self.edge = edge
        self.sectorSize = sectorSize
        self.updateInterval = updateInterval
        end = sectorSize
    }

    // MARK: Writing

    /// Appends what was done to `range`.
    func append(_ range: ByteRange, _ flags: Flags, _ payload: Payload) async throws(BlockError) {
        await locks.lock(0..<1, exclusively: true)
        defer { locks.unlock(0..<1, exclusively: true) }
        let sectors = sectors(range.count)
        var dataBytes = 0
        if case .none = payload {} else { dataBytes = sectors * sectorSize }
        guard let next = end.adding(sectorSize)?.adding(dataBytes) else {
            throw BlockError(.noSpace, "the log has no room for another entry")
        }
        try await grow(to: next)
        var entry = try sector([
            UInt64(range.offset / sectorSize), UInt64(sectors), flags.rawValue, 0,
        ])
        if case .data(let data) = payload {
            entry.append(data)
            if data.count < dataBytes {
                let padding = try IOVector(allocating: dataBytes - data.count)
                padding.fill(0)
                entry.append(padding)
            }
        }
        try await edge.write(end, from: entry)
        if case .zeroes = payload, dataBytes > 0 {
            try await edge.writeZeroes(ByteRange(end + sectorSize, dataBytes))
        }
        end = next
        entryCount += 1
        let isFlush = flags.contains(.flush)
        if isFlush || entryCount % updateInterval == 0 { try await writeSuperBlock() }
        if isFlush { try await edge.flush() }
    }

    private func sectors(_ count: Int) -> Int {
        count / sectorSize + (count % sectorSize == 0 ? 0 : 1)
    }

    private func grow(to size: Int) async throws(BlockError) {
        guard size > edge.size else { return }
        do throws(BlockError) {
            try await edge.resize(to: size)
        } catch  where error.code == .unsupported {
            throw BlockError(
                .noSpace, "the log '\(edge.node.name)' is full: it has \(edge.size) bytes")
        }
    }

    /// Brings the super block up to date.
    func finish() async throws(BlockError) {
        if countedCount != entryCount { try await writeSuperBlock() }
    }

    private func writeSuperBlock() async throws(BlockError) {
        let count = entryCount
        try await edge.write(
            0,
            from: try sector([Self.magic, Self.version, UInt64(count), UInt64(sectorSize)]))
        countedCount = count
    }

    /// A sector that begins with `words`. The super block's last one has 32 bits: it is below that.
    private func sector(_ words: [UInt64]) throws(BlockError) -> IOVector {
        let memory = try IOVector(allocating: sectorSize)
        memory.fill(0)
        var bytes: [UInt8] = []
        for word in words {
            for shift in stride(from: 0, to: 64, by: 8) {
                bytes.append(UInt8(truncatingIfNeeded: word >> UInt64(shift)))
            }
        }
        bytes.withUnsafeBytes { memory.copy(from: $0) }
        return memory
    }

    // MARK: Appending to a log

    /// Finds the end of a log that is there.
    ///
    /// - Throws: `wrongFormat` or `corrupt` when it is none, or of another version.
    static func resume(_ edge: Edge, updateInterval: Int) async throws(BlockError) -> WriteLog {
        let words = try await words(edge, at: 0)
        guard words[0] == magic, words[1] == version else {
            throw BlockError(
                .wrongFormat, "'\(edge.node.name)' holds no log of version \(version)",
                remedy: "leave log-append off to begin one")
        }
        let sectorSize = Int(words[3] & 0xffff_ffff)
        guard sectorSize.isPowerOfTwo, sectorSizes.contains(sectorSize),
            let count = Int(exactly: words[2])
        else {
            throw BlockError(.corrupt, "the log's super block makes no sense")
        }
        let log = WriteLog(edge, sectorSize: sectorSize, updateInterval: updateInterval)
        for _ in 0..<count { try await log.skipEntry() }
        log.countedCount = count
        return log
    }

    private func skipEntry() async throws(BlockError) {
        let words = try await Self.words(edge, at: end)
        let flags = Flags(rawValue: words[2])
        guard flags.isSubset(of: .known), let sectors = Int(exactly: words[1]),
            let dataBytes = flags.contains(.discard) ? 0 : sectors.multiplied(by: sectorSize),
            let next = end.adding(sectorSize)?.adding(dataBytes)
        else {
            throw BlockError(.corrupt, "the log's entry \(entryCount) at \(end) makes no sense")
        }
        end = next
        entryCount += 1
    }

    private static func words(_ edge: Edge, at offset: Int) async throws(BlockError) -> [UInt64] {
        let memory = try IOVector(allocating: 32)
        do throws(BlockError) {
            try await edge.read(offset, into: memory)
        } catch  where error.code == .outOfRange {
            throw BlockError(.corrupt, "the log '\(edge.node.name)' ends early, at \(edge.size)")
        }
        let bytes = memory.array
        return (0..<4).map { word in
            (0..<8).reduce(0) { $0 | UInt64(bytes[word * 8 + $1]) << UInt64($1 * 8) }
        }
    }
}
