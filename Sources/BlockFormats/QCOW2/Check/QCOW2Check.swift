import BlockCore
import BlockGraph
import BlockIO

/// Checks one qcow2 image, and repairs it: counts every reference to every cluster anew and compares
/// that with what the image says.
///
/// ```
/// survey    every table is read once, several reads in flight; what is wrong in itself is found:
///           misplaced entries, reserved bits, what lies past the end. With repair, clusters that are
///           claimed for two things are found too, and references count as the repair will leave them
/// compare   stored refcounts against the references
/// flags     entries' COPIED flags against the refcounts; only where something gave reason to look
/// mend      what is wrong in tables is mended or dropped, which leaks at worst; counts are written in
///           place, or, where the refcounts' own structures are broken, new ones are written beside
///           the old and the header switches over; then flags; then the dirty and corrupt bits go
/// ```
/// What is believed, where two claims contradict each other, the first most:
/// ```
/// 1 the header, as far as the disk needs it, and the encryption header
/// 2 the active L1 table, its L2 tables, their data
/// 3 snapshots      4 dirty bitmaps      5 refcounts, and lengths beyond what the disk needs
/// ```
/// Invariants:
/// 1. Memory is bounded: references are counted for a window of clusters at a time (see
///    ``QCOW2ReferenceCounts``), and the tables are read again for each window.
/// 2. An entry that is dropped is off the disk before a count falls; a count is on disk before a
///    flag relies on it; new structures are on disk before the header names them. A crash leaves the
///    image no worse than it was.
/// 3. No claim of a lower rank takes anything from one of a higher: an active entry is dropped for what
///    is wrong in itself alone. What is used as data is never mended as a table: a table that something
///    else names too is mended in place only if the active L1 table names it and it looks like one (see
///    `QCOW2Check+Conflicts.swift`).
/// 4. Nothing is repaired while a part of the image cannot be read, or while it is not known which
///    clusters hold its keys: until all is looked at, nothing is written.
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
        /// The entries that its disk and the state of its machine take.
        var neededEntryCount: Int
        /// Its entry of the snapshot table as it should be; empty where nothing is repaired.
        var entry: [UInt8]
    }

    /// Where persistent dirty bitmaps are.
    struct Bitmaps {
        /// `nil` where there are none.
        var directory: ByteRange?
        var entries: [QCOW2.BitmapEntry] = []
        /// Broken ones are left out: the directory has to be written anew, or to go.
        var isChanged = false
    }

    /// What becomes of entries that are wrong.
    enum Stage {
        /// They are found, and count as they will be. Nothing is written.
        case survey
        /// They are mended or dropped.
        case mending
        /// They are as they stay.
        case settled
    }

    /// What a repair found, until it is known whether it can be mended.
    struct Faults {
        var lines: [(text: String, isMended: Bool)] = []
        var mendedCount = 0
        /// How often those count in an image that is not repaired.
        var mendedTimes = 0
        var otherTimes = 0
    }

    static let noticeCountMax = 10_000
    /// Single things that are remembered between two steps.
    static let rememberedMax = 1 << 20
    static let repairRoundsMax = 8

    let file: Edge
    let thread: IOThread
    let geometry: QCOW2.Geometry
    let repair: CheckRepair
    /// For an image that is being opened: counts and flags are mended, and nothing is dropped.
    let isOpening: Bool
    private let notice: CheckNotice
    private var noticesLeft = QCOW2Check.noticeCountMax

    var header: QCOW2.Header
    /// Of the file; changes when a repair has put new structures into it.
    var fileSize: Int
    /// In host order.
    var refcountTable: [UInt64] = []
    var snapshots: [Snapshot] = []
    var snapshotTableBytes = 0
    /// The snapshot table is written anew, with ``snapshots``.
    var rewritesSnapshotTable = false
    /// There are some whose clusters are not known: these look like leaks.
    var lacksSnapshots = false
    /// As far as they are sound.
    var bitmaps = Bitmaps()
    /// Where the encryption header is.
    var encryptionPlace: ByteRange?
    /// Which clusters hold the keys, if there are any.
    var keysAreKnown = true
    /// Whoever opens the image says where its data file is.
    var dataFileIsGiven = false
    /// Where the end marker of the header extensions has a length that is out of bounds.
    var wrongEndMarker: Int?
    /// Header fields are to be written.
    var headerIsWrong = false
    /// The L1 table has to move.
    var movesL1 = false
    /// Entries for clusters of a data file lack the COPIED flag.
    var suspectsDataFlags = false
    /// The refcounts' own structures cannot stay where they are.
    var mustRebuild = false
    /// Clusters that cannot be anything else, whoever claims them: the header, the active L1 table as
    /// far as the disk needs it, the encryption header.
    var vital: [Range<Int>] = []
    /// Clusters that an L1 table names as L2 tables, and that are something else.
    var distrusted = Set<Int>()
    /// Entries of tables are to be mended.
    var hasFaultyEntries = false
    /// Numbers of snapshots whose L1 tables have such entries.
    var faultySnapshots = Set<Int>()

    /// Called before the header names new refcounts.
    var willSwitch: () -> Void = {}

    var report = CheckReport()
    var stage = Stage.survey
    /// What is found is told, and clusters are counted: not when the tables are read again.
    var reports = true
    /// Of the survey, which may have to begin again.
    private var isSurveying = false
    private var faults = Faults()
    private var surveyFaults = Faults()
    /// The references of the first window, as the survey counted them.
    private var surveyed: QCOW2ReferenceCounts?
    /// Later comparisons, after a repair, say nothing.
    var isComparedOnce = false
    /// One past the highest cluster that is counted or referred to.
    var usedEnd = 0
    /// Leaks are repaired, and nothing but flags is wrong besides.
    var flagsAreAlone = false
    var highestReferenced = -1

    init(
        _ file: Edge, _ header: QCOW2.Header, thread: IOThread, repair: CheckRepair,
        isOpening: Bool = false, notice: @escaping CheckNotice
    ) {
        self.file = file
        self.header = header
        self.thread = thread
        self.repair = repair
        self.isOpening = isOpening
        self.notice = notice
        geometry = header.geometry
        fileSize = file.size
    }

    var clusterBits: Int { geometry.clusterBits }
    var mendsErrors: Bool { mendsCounts && !isOpening }
    var mendsCounts: Bool { repair.contains(.errors) }
    /// A repair of leaks alone takes nothing from snapshots that it does not see.
    var mendsLeaks: Bool { repair.contains(.leaks) && (mendsCounts || !lacksSnapshots) }
    /// Flags that follow from refcounts are set right with these.
    var mendsFlags: Bool { mendsCounts || flagsAreAlone }
    /// Entries that are wrong count as a repair leaves them.
    var judges: Bool { mendsErrors && stage != .settled }
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
        try await findEncryptionHeader()
        collectVital()
        try await checkFeatures()
        try await readSnapshots()
        try await readBitmaps()
        if mendsErrors { try await shortenClaims() }
        try await survey()
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

    /// Counts and compares, one window after the other.
    func compareAll() async throws(BlockError) -> Findings {
        var findings = Findings()
        findings.needsRebuild = mustRebuild
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
        if mendsCounts { forgetRefcountUses(&findings.excess) }
        return findings
    }

    /// Counts the references to all clusters, as many at a time as fit in memory.
    func forEachWindow(
        withRefcounts: Bool,
        _ body: (QCOW2ReferenceCounts) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        var start = 0
        while true {
            let counts: QCOW2ReferenceCounts
            if let surveyed, start == 0, withRefcounts {
                counts = surveyed
            } else {
                counts = QCOW2ReferenceCounts(from: start)
                try await countAll(counts, withRefcounts: withRefcounts)
                highestReferenced = max(highestReferenced, counts.highest)
            }
            surveyed = nil
            try await body(counts)
            if counts.isLast { return }
            start = counts.window.upperBound
        }
    }

    // MARK: Survey

    /// Looks at every table, and finds out which of them a repair can believe.
    func survey() async throws(BlockError) {
        let before = report
        while try await !surveyOnce(), report.checkErrors == 0 {
            // From the beginning, without what turned out to be none of the image's.
            report = before
        }
        isSurveying = false
        reports = false
    }

    /// - Returns: whether what was counted will stay.
    private func surveyOnce() async throws(BlockError) -> Bool {
        surveyFaults = Faults()
        hasFaultyEntries = false
        faultySnapshots = []
        highestReferenced = -1
        isSurveying = true
        reports = true
        var conflicts = Conflicts()
        var start = 0
        while true {
            let counts = QCOW2ReferenceCounts(from: start)
            try await countAll(counts, withRefcounts: true)
            reports = false
            highestReferenced = max(highestReferenced, counts.highest)
            if start == 0, counts.isLast || !mendsCounts { surveyed = counts }
            if !mendsCounts || report.checkErrors > 0 { return true }
            try await findConflicts(counts, &conflicts)
            if counts.isLast { break }
            start = counts.window.upperBound
        }
        let isSettled = try await !settle(conflicts)
        if !isSettled { surveyed = nil }
        return isSettled
    }

    // MARK: Reporting

    func note(_ text: @autoclosure () -> String) {
        guard noticesLeft > 0 else { return }
        noticesLeft -= 1
        notice(noticesLeft == 0 ? "There is more: no further details are shown" : text())
    }

    /// Something is wrong; `mended` says that a repair can mend it.
    func corruption(_ text: @autoclosure () -> String, times: Int = 1, mended: Bool = false) {
        guard reports else { return }
        if mendsErrors {
            if isSurveying {
                Self.add(text(), times, mended, to: &surveyFaults)
            } else {
                Self.add(text(), times, mended, to: &faults)
            }
        } else {
            note("ERROR: " + text())
            report.corruptions += times
        }
    }

    /// Something is wrong that is told whatever the survey comes to.
    func lastingFault(_ text: String, mended: Bool = true) {
        Self.add(text, 1, mended, to: &faults)
    }

    private static func add(
        _ text: @autoclosure () -> String, _ times: Int, _ mended: Bool, to faults: inout Faults
    ) {
        if faults.lines.count < noticeCountMax { faults.lines.append((text(), mended)) }
        if mended {
            faults.mendedCount += 1
            faults.mendedTimes += times
        } else {
            faults.otherTimes += times
        }
    }

    /// Tells what was found; with `isRepaired`, that what can be mended is.
    func tellFaults(isRepaired: Bool) {
        for found in [faults, surveyFaults] {
            for line in found.lines {
                note((isRepaired && line.isMended ? "Repaired: " : "ERROR: ") + line.text)
            }
            report.corruptions += found.otherTimes
            if isRepaired {
                report.corruptionsFixed += found.mendedCount
            } else {
                report.corruptions += found.mendedTimes
            }
        }
        faults = Faults()
        surveyFaults = Faults()
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
        guard reports else { return }
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
        let queue = WaitQueue()
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
}
