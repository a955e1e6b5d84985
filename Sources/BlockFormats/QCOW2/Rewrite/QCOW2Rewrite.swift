import BlockCore
import BlockGraph

/// Writes an image anew, without what nothing refers to, cluster by cluster.
///
/// ```
/// for each part of the disk (an L1 index)
///     the L2 tables that map it, each once: of the live disk and of all snapshots
///     for each cluster of it: what these tables refer to, each once ──► read, looked at, written
/// ```
/// So all that snapshots share with the disk, and with each other, they share in the new image: snapshots
/// never share anything but at the same place of the disk. It needs memory for a part of the tables only.
/// Whether the result is the same is for ``QCOW2CopyProof`` to tell, which looks at the file that came out.
///
/// What goes: leaks, clusters that a zero flag keeps, clusters of zeroes (version 3 says so with a flag;
/// where there is no backing image, nothing needs to be said). What stays as it is: everything else, down
/// to what is not known in the header. Data in a file of its own stays there; the tables are written anew.
///
/// Confined to the graph's thread; the source is not written meanwhile.
final class QCOW2Rewrite: @unchecked Sendable {
    let source: QCOW2Driver
    let fresh: QCOW2FreshFile
    let geometry: QCOW2.Geometry
    /// Store compressed what was not.
    let compresses: Bool
    /// Told of bytes of the file that were read.
    let progress: (Int) -> Void
    /// Clusters on their way to the new file.
    var writes: RequestLanes
    /// Where nothing is said, there are zeroes.
    let leavesZeroesOut: Bool

    /// Clusters more than the old file has that a new one may take: tables that are rounded up.
    private static let slackClusterCount = 16

    private init(
        _ source: QCOW2Driver, _ target: Edge, compresses: Bool, _ progress: @escaping (Int) -> Void
    ) {
        self.source = source
        geometry = source.geometry
        fresh = QCOW2FreshFile(
            target, geometry,
            clusterCountMax: source.geometry.clusterCount(for: source.file.size)
                + Self.slackClusterCount)
        self.compresses = compresses && source.supportsCompressedWrites
        self.progress = progress
        writes = RequestLanes(on: source.node.seat)
        leavesZeroesOut = source.image.header.backingName.isEmpty && !source.hasDataFile
    }

    /// - Returns: `false` when the result would be no smaller: then the target holds nothing whole.
    static func run(
        _ source: QCOW2Driver, to target: Edge, compresses: Bool,
        _ progress: @escaping (Int) -> Void
    ) async throws(BlockError) -> Bool {
        let rewrite = QCOW2Rewrite(source, target, compresses: compresses, progress)
        do throws(BlockError) {
            try await rewrite.run()
            return true
        } catch {
            try? await rewrite.writes.finish()
            if rewrite.fresh.isTooLarge { return false }
            throw error
        }
    }

    private func run() async throws(BlockError) {
        try source.checkRewritable()
        var header = source.image.header
        _ = try fresh.take(1)
        try await writeEncryptionHeader(&header)
        let places = try await writeSnapshotTable(&header)
        try await writeMaps(places)
        try await writeBitmaps(&header)
        try await writes.finish()
        header.autoclear.formIntersection(.known)
        try await fresh.finish(header)
    }

    // MARK: Tables of fixed size

    /// The LUKS header with all of its key slots, byte by byte.
    private func writeEncryptionHeader(_ header: inout QCOW2.Header) async throws(BlockError) {
        guard let old = header.encryptionHeader else { return }
        let host = try fresh.take(geometry.clusterCount(for: old.count))
        let vector = try IOVector(allocating: old.count)
        try await source.readFile(old.offset, into: vector)
        try await fresh.write(host, from: vector)
        header.moveEncryptionHeader(to: host)
    }

    /// - Returns: where the new L1 tables go, in the order of ``QCOW2Maps``.
    private func writeSnapshotTable(
        _ header: inout QCOW2.Header
    ) async throws(BlockError) -> [Int] {
        var places: [Int] = []
        func place(_ entryCount: Int) throws(BlockError) -> Int {
            let count = geometry.clusterCount(for: entryCount * 8)
            let host = count == 0 ? 0 : try fresh.take(count)
            places.append(host)
            return host
        }
        header.l1Offset = try place(header.l1EntryCount)
        var snapshots = source.snapshots
        for index in snapshots.indices {
            snapshots[index].l1Offset = try place(snapshots[index].l1EntryCount)
        }
        guard !snapshots.isEmpty else { return places }
        let bytes = try QCOW2.Snapshot.serialiseTable(snapshots)
        header.snapshotsOffset = try fresh.take(geometry.clusterCount(for: bytes.count))
        try await fresh.write(header.snapshotsOffset, from: try QCOW2Image.vector(bytes))
        return places
    }

    // MARK: Maps

    private func writeMaps(_ places: [Int]) async throws(BlockError) {
        let maps = QCOW2Maps(of: source)
        for window in maps.windows {
            let old = try await maps.entries(window, in: source.file)
            var new = old
            for step in 0..<window.count {
                let users = old.indices.filter { step < old[$0].count && old[$0][step] != 0 }
                if users.isEmpty { continue }
                let tables = try tables(users.map { old[$0][step] })
                try await copy(tables.list, window.lowerBound + step)
                for (user, table) in zip(users, tables.ofUsers) {
                    new[user][step] = table.map { tables.list[$0].entry } ?? 0
                }
            }
            for (index, entries) in new.enumerated() {
                try await fresh.write(places[index] + window.lowerBound * 8, entries)
            }
        }
    }

    /// An L2 table that is copied.
    final class Table {
        /// In the old file.
        let host: Int
        /// L1 tables that name it.
        var references: UInt64 = 1
        /// In the new file; 0 as long as nothing in it says anything.
        var newHost = 0

        init(_ host: Int) { self.host = host }

        var entry: UInt64 {
            if newHost == 0 { return 0 }
            return UInt64(newHost) | (references == 1 ? QCOW2.L1Entry.copiedFlag : 0)
        }
    }

    /// The tables that L1 entries name, each once.
    ///
    /// - Returns: them, and for each entry the index of its own.
    private func tables(
        _ entries: [UInt64]
    ) throws(BlockError) -> (list: [Table], ofUsers: [Int?]) {
        var list: [Table] = []
        var known: [Int: Int] = [:]
        var ofUsers: [Int?] = []
        for raw in entries {
            let host = try source.tableHost(raw)
            if host == 0 {
                ofUsers.append(nil)
            } else if let index = known[host] {
                list[index].references += 1
                ofUsers.append(index)
            } else {
                known[host] = list.count
                ofUsers.append(list.count)
                list.append(Table(host))
            }
        }
        return (list, ofUsers)
    }

    /// Copies what `tables` refer to, which all map the part `index` of the disk, and the tables.
    private func copy(_ tables: [Table], _ index: Int) async throws(BlockError) {
        if tables.isEmpty { return }
        let partBytes = QCOW2TablePart.bytes(tables.count, geometry)
        let old = try QCOW2TablePart(tables.count, partBytes, geometry)
        let new = try QCOW2TablePart(tables.count, partBytes, geometry)
        for start in stride(from: 0, to: geometry.clusterSize, by: partBytes) {
            try await old.load(tables.map(\.host), from: start, of: source)
            progress(tables.count * partBytes)
            let guest = index << geometry.l2CoverageBits
            let first = guest + (start >> geometry.l2EntryShift) << geometry.clusterBits
            try await copy(old, to: new, tables, first)
            for (number, table) in tables.enumerated() {
                try await write(new.slice(number), at: start, of: table)
            }
        }
    }

    /// Writes a part of a new table, unless it says nothing.
    private func write(
        _ part: IOSlice, at start: Int, of table: Table
    ) async throws(BlockError) {
        if ZeroDetection.isZero(UnsafeRawBufferPointer(part.bytes)) { return }
        if table.newHost == 0 {
            table.newHost = try fresh.take(1, references: table.references)
        }
        try await fresh.write(table.newHost + start, from: IOVector(part))
    }
}

extension QCOW2.Header {
    /// The encryption header is at `host` from now on; everything else stays.
    mutating func moveEncryptionHeader(to host: Int) {
        let type = QCOW2.HeaderExtension.encryptionHeader
        guard let place = encryptionHeader,
            let index = extensions.firstIndex(where: { $0.type == type })
        else { return }
        extensions[index].data.withUnsafeMutableBytes { $0.storeBigEndian(UInt64(host), at: 0) }
        encryptionHeader = ByteRange(host, place.count)
    }
}

extension QCOW2Driver {
    /// - Throws: what has to be done before the image can be written anew.
    func checkRewritable() throws(BlockError) {
        if let failure = bitmaps.failure {
            throw failure.doing("the image's dirty bitmaps could not be kept")
        }
        let header = image.header
        guard header.incompatible.isDisjoint(with: [.dirty, .corrupt]) else {
            throw BlockError(
                .corrupt, "the image was not closed properly, or is marked corrupt",
                remedy: "check -r all first", node: node.name)
        }
        guard encryption?.method != .luks || encryption?.cipher != nil else {
            throw EncryptionOptions.lockedError("encrypt.key-secret")
        }
    }

    /// Bytes of the image's file.
    public var fileSize: Int { file.size }

    /// Writes the image anew to `target`, an empty file, without what nothing refers to: its disk, its
    /// snapshots, its dirty bitmaps and its keys. All is durable on return.
    ///
    /// Nobody writes the image meanwhile. Data in an external data file stays there.
    ///
    /// - Parameters:
    ///   - compresses: store compressed what was not; where the format cannot, it is not done.
    ///   - progress: told of bytes of the image's file that are done with, in steps.
    /// - Returns: `false` when the result would be no smaller: then the target holds nothing whole.
    /// - Throws: `corrupt` for images that have to be repaired first; `permissionDenied` for an image with
    ///   LUKS whose key is missing: sectors are encrypted for their place in the file.
    public func rewrite(
        to target: Edge, compresses: Bool, progress: @escaping (Int) -> Void
    ) async throws(BlockError) -> Bool {
        try await QCOW2Rewrite.run(self, to: target, compresses: compresses, progress)
    }

    /// Compares the image with a copy that ``rewrite(to:compresses:progress:)`` made, as it came out:
    /// every cluster of the disk and of each snapshot, all bitmaps, all that the header says.
    ///
    /// - Throws: `corrupt`, with the first difference.
    public func prove(
        _ copy: QCOW2Driver, progress: @escaping (Int) -> Void
    ) async throws(BlockError) {
        try await QCOW2CopyProof(self, copy, progress).run()
    }
}
