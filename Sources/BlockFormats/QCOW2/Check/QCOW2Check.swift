import BlockCore
import BlockGraph
import BlockIO

/// Checks one qcow2 image, and repairs it: counts every reference to every cluster anew and compares
/// that with what the image says.
///
/// ```
/// survey    every table is read once, several reads in flight; what is wrong in itself is found:
///           misplaced entries, reserved bits, what lies past the end. With repair it is mended or
///           dropped at once, which leaks at worst
/// compare   stored refcounts against the references
/// flags     entries' COPIED flags against the refcounts; only where something gave reason to look
/// mend      counts are written in place, or, where the refcounts' own structures are broken, new
///           ones are written beside the old and the header switches over; then flags; then the
///           dirty and corrupt bits go
/// ```
/// Invariants:
/// 1. Memory is bounded: references are counted for a window of clusters at a time (see
///    ``QCOW2ReferenceCounts``), and the tables are read again for each window.
/// 2. An entry that is dropped is off the disk before a count falls; a count is on disk before a
///    flag relies on it; new structures are on disk before the header names them. A crash leaves the
///    image no worse than it was.
/// 3. A table is mended in place only where nothing else of the image lies: what an entry of the L1
///    table names inside of another structure is dropped, not followed.
/// 4. Nothing is repaired while a part of the image cannot be read.
///
/// The image is open for nothing else meanwhile. Confined to the graph's thread.
final class QCOW2Check {
    /// What comparing found, beside what was reported at once.
    struct Findings {
        /// Clusters with more references than their refcount says.
        var lowCount = 0
        var leakCount = 0
        /// Refcount blocks and entries of the refcount table that are wrong.
        var brokenBlockCount = 0
        /// The refcounts cannot be written where they are.
        var needsRebuild = false
        /// A structure that is written in place shares clusters with something else.
        var l1IsShared = false
        /// COPIED flags may be wrong somewhere.
        var suspectsFlags = false
        /// References beyond what the refcounts' width can hold, by cluster.
        var excess: [Int: UInt64] = [:]
        /// Stored counts that are wrong, by cluster.
        var stored: [Int: UInt64] = [:]
    }

    /// A snapshot, as far as a check needs it.
    struct Snapshot {
        var name: String
        var l1Offset: Int
        var l1EntryCount: Int
    }

    /// Where persistent dirty bitmaps are.
    struct Bitmaps {
        var directory: ByteRange?
        var tables: [ByteRange] = []
        var structures: [ByteRange] { tables + (directory.map { [$0] } ?? []) }
    }

    static let noticeCountMax = 10_000
    /// Single things that are remembered between two steps.
    static let rememberedMax = 1 << 20
    static let repairRoundsMax = 8

    let file: Edge
    let thread: IOThread
    let geometry: QCOW2.Geometry
    let repair: CheckRepair
    private let notice: CheckNotice
    private var noticesLeft = QCOW2Check.noticeCountMax

    var header: QCOW2.Header
    /// Of the file; changes when a repair has put new structures into it.
    var fileSize: Int
    /// In host order.
    var refcountTable: [UInt64] = []
    var snapshots: [Snapshot] = []
    var snapshotTableBytes = 0
    /// What the snapshot table is to become; `nil` while it stays.
    var newSnapshotTable: [UInt8]?
    var newSnapshotCount = 0
    /// The bitmaps' directory and tables, as far as they are sound.
    var bitmaps = Bitmaps()
    /// The L1 table has to move.
    var movesL1 = false
    /// Entries for clusters of a data file lack the COPIED flag.
    var suspectsDataFlags = false
    /// Ranges of clusters that hold structures other than L2 tables, in order; for repairs.
    var fixedStructures: [Range<Int>] = []

    /// Called before the header names new refcounts.
    var willSwitch: () -> Void = {}

    var report = CheckReport()
    /// The first pass over the tables reports, counts clusters, and repairs.
    var isSurvey = true
    /// Later comparisons, after a repair, say nothing.
    var isComparedOnce = false
    /// One past the highest cluster that is counted or referred to.
    var usedEnd = 0
    /// Leaks are repaired, and nothing but flags is wrong besides.
    var flagsAreAlone = false
    var highestReferenced = -1

    init(
        _ file: Edge, _ header: QCOW2.Header, thread: IOThread, repair: CheckRepair,
        notice: @escaping CheckNotice
    ) {
        self.file = file
        self.header = header
        self.thread = thread
        self.repair = repair
        self.notice = notice
        geometry = header.geometry
        fileSize = file.size
    }

    var clusterBits: Int { geometry.clusterBits }
    var mendsErrors: Bool { repair.contains(.errors) }
    /// Flags that follow from refcounts are set right with these.
    var mendsFlags: Bool { mendsErrors || flagsAreAlone }
    var hasExtendedEntries: Bool { header.incompatible.contains(.extendedL2) }
    var hasDataFile: Bool { header.incompatible.contains(.externalData) }
    /// Bytes of one entry of an L2 table.
    var entryBytes: Int { hasExtendedEntries ? 16 : 8 }
    var l1ClusterCount: Int { geometry.clusterCount(for: header.l1EntryCount * 8) }

    /// Offsets below this can be referred to: the last cluster of the file may be there in part.
    var offsetEnd: Int {
        guard mendsErrors else { return fileSize }
        // More than the largest refcount table counts cannot be kept.
        let blocks = QCOW2.Limit.refcountTableBytesMax / 8
        let counted = blocks.multiplied(by: 1 << (geometry.refcountBlockBits + clusterBits)) ?? .max
        return min(fileSize, counted)
    }

    // MARK: The whole

    func run() async throws(BlockError) -> CheckReport {
        report.totalClusters = geometry.clusterCount(for: header.size)
        refcountTable = try await table(
            header.refcountTableOffset, header.refcountTableClusters << (clusterBits - 3))
        if mendsErrors { collectFixedStructures() }
        try await checkFeatures()
        try await readSnapshots()
        try await readBitmaps()
        if mendsErrors { collectFixedStructures() }
        let findings = try await compareAll()
        if repair.isEmpty {
            report.corruptions += findings.lowCount + findings.brokenBlockCount
            report.leaks += findings.leakCount
        } else {
            try await mend(findings)
        }
        report.imageEndOffset = usedEnd << clusterBits
        return report
    }

    /// Fields that make no sense beside another.
    private func checkFeatures() async throws(BlockError) {
        var isWrong = false
        if header.autoclear.contains(.rawExternalData), !hasDataFile {
            corruption(
                "an external data file is said to be raw, and there is none", mended: mendsErrors)
            header.autoclear.remove(.rawExternalData)
            isWrong = true
        }
        // Nobody reads a table of no snapshots; but readers look at where it is said to be.
        let start = try await read(0, 512)
        let table: UInt64 = UnsafeRawBufferPointer(start.bytes).bigEndian(at: 64)
        let isPlace = table >> 63 == 0 && Int(table).isAligned(to: geometry.clusterSize)
        if header.snapshotCount == 0, !isPlace {
            corruption("the table of no snapshots is at \(table)", mended: mendsErrors)
            isWrong = true
        }
        if isWrong, mendsErrors { try await patchHeader() }
    }

    /// Counts and compares, one window after the other.
    func compareAll() async throws(BlockError) -> Findings {
        var findings = Findings()
        usedEnd = 0
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            self.noteShared(counts, &findings)
            try await self.compare(counts, &findings)
            if counts.hasWrongFlags || self.suspectsDataFlags { findings.suspectsFlags = true }
            if self.repair.isEmpty, findings.suspectsFlags || !findings.stored.isEmpty {
                let stored = findings.stored
                self.report.corruptions += try await self.checkFlags(counts, stored: stored)
            }
        }
        isComparedOnce = true
        return findings
    }

    /// Counts the references to all clusters, as many at a time as fit in memory.
    func forEachWindow(
        withRefcounts: Bool,
        _ body: (QCOW2ReferenceCounts) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        var start = 0
        while true {
            let counts = QCOW2ReferenceCounts(from: start)
            let end = counts.window.upperBound
            try await countAll(counts, withRefcounts: withRefcounts)
            highestReferenced = max(highestReferenced, counts.highest)
            if isSurvey {
                isSurvey = false
                // What was dropped is off the disk before any count falls.
                if mendsErrors { try await file.flush() }
            }
            try await body(counts)
            if counts.window.upperBound == end { return }
            start = counts.window.upperBound
        }
    }

    // MARK: Reporting

    func note(_ text: @autoclosure () -> String) {
        guard noticesLeft > 0 else { return }
        noticesLeft -= 1
        notice(noticesLeft == 0 ? "There is more: no further details are shown" : text())
    }

    /// Something is wrong; `mended` says that it is not any more.
    func corruption(_ text: @autoclosure () -> String, times: Int = 1, mended: Bool = false) {
        guard isSurvey else { return }
        if mended {
            note("Repaired: " + text())
            report.corruptionsFixed += 1
        } else {
            note("ERROR: " + text())
            report.corruptions += times
        }
    }

    /// A name from the image, as it can be shown: a terminal obeys control characters.
    static func printable(_ name: some Sequence<UInt8>) -> String {
        let text = String(decoding: Array(name), as: UTF8.self)
        return String(
            String.UnicodeScalarView(
                text.unicodeScalars.map { scalar in
                    scalar.properties.generalCategory == .control ? "?" : scalar
                }))
    }

    func failure(_ what: @autoclosure () -> String, _ error: BlockError) {
        guard isSurvey else { return }
        note("ERROR: cannot read \(what()): \(error.message)")
        report.checkErrors += 1
    }

    // MARK: Reading

    /// Reads `[host, host + count)`; zeroes past the end of the file.
    func read(_ host: Int, _ count: Int) async throws(BlockError) -> IOSlice {
        let memory = try IOBuffer(count: count).prefix(count)
        try await Self.read(file, host, memory)
        return memory
    }

    static func read(_ file: Edge, _ host: Int, _ memory: IOSlice) async throws(BlockError) {
        let vector = IOVector(memory)
        let there = max(0, min(memory.count, file.size - host))
        if there < memory.count { vector.zero(there, memory.count - there) }
        if there > 0 { try await file.read(host, into: vector.slice(0, there)) }
    }

    /// A table of 64-bit numbers, in host order.
    func table(_ offset: Int, _ count: Int) async throws(BlockError) -> [UInt64] {
        if count == 0 { return [] }
        let memory = try await read(offset, count * 8)
        let bytes = UnsafeRawBufferPointer(memory.bytes)
        return (0..<count).map { bytes.bigEndian(at: $0 * 8) }
    }

    /// A part of the file that is read ahead.
    private final class Ahead: @unchecked Sendable {
        let memory: IOSlice
        var error: BlockError?
        var isDone = false
        let queue = QCOW2WaitQueue()
        init(_ memory: IOSlice) { self.memory = memory }
    }

    static let readsInFlight = 8

    /// Reads many parts of the file, several at a time, and hands them over in order.
    ///
    /// - Parameters:
    ///   - place: where part number `n` is.
    ///   - body: gets its number and its bytes; or the error that kept it from being read.
    func readEach(
        _ total: Int, _ place: (Int) -> ByteRange,
        _ body: (Int, IOSlice, BlockError?) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        var ahead: [Ahead] = []
        var started = 0
        var done = 0
        while done < total {
            while started < total, ahead.count < Self.readsInFlight {
                let range = place(started)
                let part = Ahead(try IOBuffer(count: range.count).prefix(range.count))
                start(part, range.offset)
                ahead.append(part)
                started += 1
            }
            let part = ahead.removeFirst()
            while !part.isDone { await part.queue.wait() }
            try await body(done, part.memory, part.error)
            done += 1
        }
    }

    private func start(_ part: Ahead, _ offset: Int) {
        let file = file
        thread.spawn {
            do throws(BlockError) {
                try await QCOW2Check.read(file, offset, part.memory)
            } catch {
                part.error = error
            }
            part.isDone = true
            part.queue.wakeAll()
        }
    }

    // MARK: Writing

    /// Writes back the sectors of `memory`, which was read at `host`, that hold bytes `range`.
    func writeBack(_ memory: IOSlice, at host: Int, _ range: Range<Int>) async throws(BlockError) {
        let start = range.lowerBound.roundedDown(to: 512)
        let end = min(memory.count, (range.upperBound + 511).roundedDown(to: 512))
        try await grow(to: host + end)
        try await file.write(host + start, from: IOVector(memory.slice(start, end - start)))
    }

    func write(_ bytes: [UInt8], at host: Int) async throws(BlockError) {
        try await grow(to: host + bytes.count)
        try await file.write(host, from: try QCOW2Image.vector(bytes))
    }

    func grow(to end: Int) async throws(BlockError) {
        guard end > file.size else { return }
        do throws(BlockError) {
            try await file.resize(to: end)
        } catch  where error.code == .unsupported {
            throw BlockError(
                .noSpace,
                "the repair needs \(end) bytes, '\(file.node.name)' has \(file.size) and "
                    + "cannot grow", remedy: "give it a larger device")
        }
    }

    /// Changes the header's fields on disk to what `header` has, leaving all else as it is.
    func patchHeader() async throws(BlockError) {
        let start = try await read(0, 512)
        start.bytes.storeBigEndian(UInt32(header.l1EntryCount), at: 36)
        start.bytes.storeBigEndian(UInt64(header.l1Offset), at: 40)
        start.bytes.storeBigEndian(UInt64(header.refcountTableOffset), at: 48)
        start.bytes.storeBigEndian(UInt32(header.refcountTableClusters), at: 56)
        start.bytes.storeBigEndian(UInt32(header.snapshotCount), at: 60)
        start.bytes.storeBigEndian(UInt64(header.snapshotsOffset), at: 64)
        if header.version == 3 {
            start.bytes.storeBigEndian(header.incompatible.rawValue, at: 72)
            start.bytes.storeBigEndian(header.autoclear.rawValue, at: 88)
            start.bytes.storeBigEndian(UInt32(header.refcountOrder), at: 96)
        }
        try await file.write(0, from: IOVector(start))
        try await file.flush()
    }
}
