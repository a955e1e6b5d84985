import BlockCore
import BlockIO

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The files of a simulated machine, by path. They outlive crashes; what was not synchronised may not.
///
/// Names, like file systems with a journal keep them: changes of names reach the medium in order, at
/// the latest when a file made since is synchronised.
///
/// Thread rule: while a machine runs, confined to its ``IOThread``; otherwise to whoever holds it.
public final class SimulatedDisk: @unchecked Sendable {
    private enum NameChange {
        case link(String, SimulatedFile)
        case unlink(String)
    }

    private var names: [String: SimulatedFile] = [:]
    private var durableNames: [String: SimulatedFile] = [:]
    private var nameLog: [NameChange] = []
    private var lastNumber: UInt64 = 0
    /// Space in all, in bytes; `nil` for no end of it. Writes that need more get `ENOSPC`.
    public var capacityBytes: Int?

    public init() {}

    // MARK: For tests

    /// Makes a file of zeroes, on stable storage. An existing one is replaced.
    public func addFile(_ path: String, size: Int) {
        var content = SparseBytes()
        content.setSize(size)
        add(path, content)
    }

    /// Makes a file that holds `bytes`, on stable storage. An existing one is replaced.
    public func addFile(_ path: String, bytes: [UInt8]) {
        var content = SparseBytes()
        bytes.withUnsafeBytes { content.write(0, $0) }
        add(path, content)
    }

    private func add(_ path: String, _ content: SparseBytes) {
        commitNames()
        lastNumber += 1
        let file = SimulatedFile(number: lastNumber, content: content)
        names[path] = file
        durableNames[path] = file
    }

    /// In alphabetical order.
    public var paths: [String] { names.keys.sorted() }

    /// Has a process that nobody sees take a shared lock on a byte of a file.
    public func lockUnseen(_ path: String, _ byte: Int) {
        names[path]?.locks.append((SimulatedFile.unseenHolder, ByteRange(byte, 1), false))
    }

    /// Its locks go.
    public func unlockUnseen(_ path: String) {
        names[path]?.locks.removeAll { $0.holder == SimulatedFile.unseenHolder }
    }

    public func size(of path: String) -> Int? { names[path]?.current.size }

    /// Space that a file takes, in bytes.
    public func allocatedBytes(of path: String) -> Int? { names[path]?.current.allocatedBytes }

    /// All of a file, as programs see it.
    public func bytes(of path: String) -> [UInt8]? {
        names[path].map { $0.current.bytes(ByteRange(0, $0.current.size)) }
    }

    /// A part of a file, as programs see it; zeroes past its end.
    public func bytes(of path: String, _ range: ByteRange) -> [UInt8]? {
        names[path]?.current.bytes(range)
    }

    /// A disk as it may be found if the power went away now. This one is not changed: one moment has
    /// many survivors.
    public func survivor(
        _ losses: CrashLosses, using random: inout SeededRandom
    ) -> SimulatedDisk {
        let disk = SimulatedDisk()
        disk.lastNumber = lastNumber
        disk.capacityBytes = capacityBytes
        var surviving = durableNames
        // In order: a change of a name is there only if those before it are.
        let kept: Int
        switch (losses.keptPerMille, losses.tornPerMille) {
        case (1000, _): kept = nameLog.count
        case (0, 0): kept = 0
        default: kept = random.between(0...nameLog.count)
        }
        for change in nameLog.prefix(kept) { Self.apply(change, to: &surviving) }
        // By name, so that the numbers drawn do not depend on a table's order.
        var copies: [UInt64: SimulatedFile] = [:]
        for (path, file) in surviving.sorted(by: { $0.key < $1.key }) {
            let copy = copies[file.number] ?? file.survivor(losses, &random)
            copies[file.number] = copy
            disk.names[path] = copy
        }
        disk.durableNames = disk.names
        return disk
    }

    /// Becomes ``survivor(_:using:)`` of itself.
    public func crash(_ losses: CrashLosses, using random: inout SeededRandom) {
        let survivor = survivor(losses, using: &random)
        names = survivor.names
        durableNames = survivor.durableNames
        nameLog = []
    }

    /// A disk with the same files, all of them on stable storage.
    public func copy() -> SimulatedDisk {
        var unused = SeededRandom(seed: 0)
        return survivor(.none, using: &unused)
    }

    // MARK: For the machine

    func file(_ path: String) -> SimulatedFile? { names[path] }

    func create(_ path: String) -> SimulatedFile {
        lastNumber += 1
        let file = SimulatedFile(number: lastNumber)
        note(.link(path, file))
        return file
    }

    func remove(_ path: String) -> Bool {
        guard names[path] != nil else { return false }
        note(.unlink(path))
        return true
    }

    private func note(_ change: NameChange) {
        Self.apply(change, to: &names)
        nameLog.append(change)
    }

    /// All changes of names so far are on stable storage.
    private func commitNames() {
        for change in nameLog { Self.apply(change, to: &durableNames) }
        nameLog = []
    }

    /// A file was synchronised: its own name lasts from then on, and what was done before it.
    func commitName(of file: SimulatedFile) {
        let isNew = nameLog.contains {
            if case .link(_, let linked) = $0 { return linked === file }
            return false
        }
        if isNew { commitNames() }
    }

    private static func apply(_ change: NameChange, to names: inout [String: SimulatedFile]) {
        switch change {
        case .link(let path, let file): names[path] = file
        case .unlink(let path): names[path] = nil
        }
    }

    /// How much of `range` of `file` fits: all, or the start that needs no more space than there is.
    func room(for range: ByteRange, in file: SimulatedFile) -> Int {
        guard let capacityBytes else { return range.count }
        var free = capacityBytes - names.values.reduce(0) { $0 + $1.current.allocatedBytes }
        let growth = file.current.growth(of: range)
        if growth <= free { return range.count }
        var fitting = 0
        while fitting < range.count {
            let offset = range.offset + fitting
            let step = min(
                SparseBytes.pageSize - offset % SparseBytes.pageSize, range.count - fitting)
            free -= file.current.growth(of: ByteRange(offset, step))
            if free < 0 { break }
            fitting += step
        }
        return fitting
    }
}
