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
        if let slice = cache.lookup(offset >> driver.sliceShift) { return slice }
        guard let host = try await driver.sliceHost(offset, in: l1) else { return nil }
        return try await cache.load(offset >> driver.sliceShift, host: host) {
            () throws(BlockError) in
            // Nothing is ever dirty here.
        }
    }

    func hasNoTable(_ index: Int) -> Bool {
        index < l1.count && QCOW2.L1Entry(rawValue: l1[index]).offset == 0
    }

    func readSnapshot(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        try await driver.readRuns(offset, into: vector, of: self)
    }

    func snapshotStatus(
        _ range: ByteRange, precise: Bool
    ) async throws(BlockError) -> BlockStatus {
        var status = try await driver.blockStatus(range, of: self)
        if status.flags.isEmpty {
            // Not in the image: what the backing image has, or nothing.
            let (flags, count) = try await driver.backingStatus(
                ByteRange(range.offset, status.count), precise: precise)
            status.flags = flags
            status.count = count
        }
        return status
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
    /// What the backing image says of bytes that this image does not have.
    func backingStatus(
        _ range: ByteRange, precise: Bool
    ) async throws(BlockError) -> (flags: ExtentFlags, count: Int) {
        guard let backing = node.backing, range.offset < backing.size else {
            return (.zero, range.count)
        }
        let there = ByteRange(range.offset, min(range.count, backing.size - range.offset))
        let status = try await backing.chainStatus(there, precise: precise)
        return (status.flags.intersection([.data, .zero]), status.count)
    }
}
