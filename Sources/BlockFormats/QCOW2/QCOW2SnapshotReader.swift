import BlockCore
import BlockGraph

/// Reads one snapshot of an open image, while the image is written. Confined to the graph's thread.
///
/// Why it needs no lock: what the snapshot refers to has a reference of its own, so that the live disk
/// neither changes it in place nor gives it back; and while this is there, the snapshot is not deleted.
/// Its L2 tables change in their COPIED flags at most, which readers do not look at.
final class QCOW2SnapshotReader: SnapshotSource, QCOW2TableView, @unchecked Sendable {
    /// Of L2 slices in memory.
    static let cacheBytesMax = 1 << 20

    let snapshotSize: Int
    private var driver: QCOW2Driver
    private let l1: [UInt64]
    private var cache: QCOW2TableCache
    private let user: (identifier: [UInt8], name: String)

    init(
        _ driver: QCOW2Driver, _ l1: [UInt64], size: Int, user: (identifier: [UInt8], name: String)
    ) {
        self.driver = driver
        self.l1 = l1
        snapshotSize = size
        self.user = user
        cache = Self.cache(driver)
    }

    private static func cache(_ driver: QCOW2Driver) -> QCOW2TableCache {
        QCOW2TableCache(
            file: driver.file, sliceBytes: driver.l2.sliceBytes, bytesMax: cacheBytesMax)
    }

    /// Goes on with the driver that takes the place of the one it came from. Nothing is in flight.
    func follow(_ driver: QCOW2Driver) {
        self.driver = driver
        // Its slices may have another size.
        cache = Self.cache(driver)
    }

    func slice(at offset: Int) async throws(BlockError) -> QCOW2TableCache.Slice? {
        if let slice = sliceInMemory(at: offset) { return slice }
        guard let host = try await driver.sliceHost(offset, in: l1) else { return nil }
        return try await cache.load(offset >> driver.sliceShift, host: host) {
            () throws(BlockError) in
            // Nothing is ever dirty here.
        }
    }

    func sliceInMemory(at offset: Int) -> QCOW2TableCache.Slice? {
        cache.lookup(offset >> driver.sliceShift)
    }

    func hasNoTable(_ index: Int) -> Bool {
        index < l1.count && QCOW2.L1Entry(rawValue: l1[index]).offset == 0
    }

    func readSnapshot(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        try await driver.readRuns(offset, into: vector, of: self)
    }

    func readSnapshotNow(_ offset: Int, into vector: IOVector) -> Bool {
        driver.readNow(offset, into: vector, of: self)
    }

    func snapshotStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        let own = answer.below
        own.removeAll()
        try await driver.blockStatus(range, of: self, precise: precise, into: own)
        var offset = range.offset
        for run in own.runs {
            if run.flags.isEmpty {
                // Not in the image: what the backing image has, or nothing.
                let before = answer.byteCount
                try await driver.backingStatus(
                    ByteRange(offset, run.count), precise: precise, into: answer, by: own.below)
                guard answer.byteCount - before == run.count else { return }
            } else {
                // Nothing but the flags: where it is stored is not a place of the snapshot.
                guard answer.append(BlockStatus(run.flags, count: run.count)) else { return }
            }
            offset += run.count
        }
    }

    func discardSnapshot(_ range: ByteRange) async throws(BlockError) {
        throw BlockError(.unsupported, "parts of an internal snapshot cannot be dropped")
    }

    func close() {
        driver.snapshotReaders.removeAll { $0 === self }
        driver.closeSnapshot(user.identifier, user: user.name)
    }
}

extension QCOW2Driver {
    /// Adds what the backing image says of bytes that this image does not have, as far as there is room.
    fileprivate func backingStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList, by list: BlockStatusList
    ) async throws(BlockError) {
        var there = 0
        if let backing = node.backing, range.offset < backing.size {
            there = min(range.count, backing.size - range.offset)
            try await backing.chainStatus(
                ByteRange(range.offset, there), precise: precise, into: list)
            for run in list.runs {
                let flags = run.flags.intersection([.data, .zero])
                guard answer.append(BlockStatus(flags, count: run.count)) else { return }
            }
            guard list.byteCount == there else { return }
        }
        answer.append(BlockStatus(.zero, count: range.count - there))
    }
}
