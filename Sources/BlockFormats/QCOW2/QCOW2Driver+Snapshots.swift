import BlockCore
import BlockGraph

// Internal snapshots: made, applied and deleted while nothing is in flight on the node.
//
// ```
// create   (dirty) counts + 1, COPIED flags off │ copy of the L1 table, new snapshot table │ header
// delete   (dirty) new snapshot table │ header │ counts - 1, COPIED flags on │ (clean)
// apply    (dirty) counts + 1, COPIED flags off │ new L1 table │ header │ counts - 1 │ (clean)
// ```
// Each `│` is a flush. The header is one sector: the change takes effect with it, or not at all. Counts
// are never too low on disk. In between they may be too high and flags out of date, which the dirty bit
// of version 3 tells whoever opens the image next; in version 2 that much leaks.

extension QCOW2Driver: InternalSnapshotStore {
    public var internalSnapshots: [InternalSnapshot] {
        snapshots.map(describe)
    }

    private func describe(_ snapshot: QCOW2.Snapshot) -> InternalSnapshot {
        InternalSnapshot(
            identifier: String(decoding: snapshot.identifier, as: UTF8.self),
            name: String(decoding: snapshot.name, as: UTF8.self),
            diskSize: diskSize(of: snapshot), vmStateSize: snapshot.vmStateSize,
            date: SnapshotDate(seconds: snapshot.seconds, nanoseconds: snapshot.nanoseconds),
            vmClockNanoseconds: snapshot.vmClock, instructionCount: snapshot.instructionCount)
    }

    /// Parsing checked that it fits.
    func diskSize(of snapshot: QCOW2.Snapshot) -> Int {
        snapshot.diskSize.map { Int(clamping: $0) } ?? image.header.size
    }

    // MARK: Create

    public func createSnapshot(
        _ name: String, at date: SnapshotDate
    ) async throws(BlockError) -> InternalSnapshot {
        guard name.utf8.count <= QCOW2.Limit.snapshotNameBytesMax else {
            throw BlockError(
                .invalidArgument,
                "a snapshot's name of \(name.utf8.count) bytes is longer than "
                    + "\(QCOW2.Limit.snapshotNameBytesMax)")
        }
        guard snapshots.count < QCOW2.Limit.snapshotCountMax else {
            throw BlockError(
                .exhausted, "the image has \(snapshots.count) snapshots, as many as it may have",
                remedy: "delete some")
        }
        guard !hasDataFile else {
            throw BlockError(
                .unsupported, "images with an external data file have no internal snapshots")
        }
        try await prepareChange()
        var snapshot = QCOW2.Snapshot()
        snapshot.identifier = Array(nextIdentifier.utf8)
        snapshot.name = Array(name.utf8)
        snapshot.seconds = date.seconds
        snapshot.nanoseconds = date.nanoseconds
        snapshot.l1EntryCount = image.l1.count
        snapshot.stateDiskSize(node.size)
        // An instruction count of 0, as there is no machine.
        snapshot.extra.append(
            contentsOf: [UInt8](repeating: 0, count: QCOW2.Snapshot.extraLength - 16))

        try await beginChange()
        var isRetained = false
        var copy: QCOW2Refcounts.Allocation?
        do throws(BlockError) {
            // First: they find what is in use with a count of 0, which would be handed out.
            let shared = try await changeReferences(of: image.l1, .retain)
            isRetained = true
            if !image.l1.isEmpty {
                let place = try await refcounts.allocate(exactly: l1Clusters(image.l1.count))
                copy = place
                snapshot.l1Offset = place.offset
                try await writeL1(shared, to: place)
            }
            image.l1 = shared
            try await writeActiveL1()
            try await replaceTable(with: snapshots + [snapshot], endsChange: true)
        } catch {
            try await undoCreation(copy, isRetained: isRetained, after: error)
        }
        return describe(snapshot)
    }

    /// Gives everything back that a snapshot took which did not come about.
    private func undoCreation(
        _ copy: QCOW2Refcounts.Allocation?, isRetained: Bool, after error: BlockError
    ) async throws(BlockError) -> Never {
        // Then it is not known what the disk names.
        guard image.writeFailure == nil else { throw error }
        do throws(BlockError) {
            if isRetained {
                _ = try await changeReferences(of: image.l1, .release(discards: false))
            }
            if let copy {
                try await refcounts.release(copy.offset >> geometry.clusterBits, copy.count)
            }
            image.l1 = try await changeReferences(of: image.l1, .flags)
            try await writeActiveL1()
            try await endChange()
        } catch {
            // Leaks; the dirty bit stays.
        }
        throw error
    }

    /// One above the highest number in use.
    private var nextIdentifier: String {
        let highest = snapshots.compactMap {
            UInt64(String(decoding: $0.identifier, as: UTF8.self))
        }
        .filter { $0 < .max }.max()
        return String((highest ?? 0) + 1)
    }

    // MARK: Delete

    public func deleteSnapshot(_ identifier: String) async throws(BlockError) {
        let index = try index(of: identifier)
        try checkUnused(snapshots[index], "deleted")
        try await prepareChange()
        let l1 = try await readL1(of: snapshots[index])
        let place = snapshots[index].l1Offset >> geometry.clusterBits
        var rest = snapshots
        rest.remove(at: index)
        try await beginChange()
        do throws(BlockError) {
            try await replaceTable(with: rest, endsChange: false)
        } catch {
            if image.writeFailure == nil { try? await endChange() }
            throw error
        }
        // From here on the snapshot is gone, whatever happens.
        do throws(BlockError) {
            let discards = options.passDiscardSnapshot
            _ = try await changeReferences(of: l1, .release(discards: discards))
            try await releaseTable(place, l1Clusters(l1.count), discards: discards)
            image.l1 = try await changeReferences(of: image.l1, .flags)
            try await writeActiveL1()
            try await endChange()
        } catch {
            throw error.doing("the snapshot is deleted, but its space was not given back")
        }
    }

    private func releaseTable(
        _ first: Int, _ count: Int, discards: Bool
    ) async throws(BlockError) {
        if discards {
            try await discardBelow(Removal(first: first, count: count, discards: true))
        }
        try await refcounts.release(first, count)
    }

    // MARK: Apply

    public func applySnapshot(_ identifier: String) async throws(BlockError) {
        let snapshot = snapshots[try index(of: identifier)]
        try checkUnused(snapshot, "applied")
        guard node.dirtyBitmaps.isEmpty else {
            throw BlockError(
                .busy, "dirty bitmaps follow the changes of the disk; a snapshot would escape them",
                remedy: "remove the bitmaps first", node: node.name)
        }
        let size = diskSize(of: snapshot)
        guard size <= geometry.sizeMax else {
            throw BlockError(
                .corrupt,
                "the snapshot's disk of \(size) bytes is too large for clusters of "
                    + "\(geometry.clusterSize) bytes", remedy: "repair the image", node: node.name)
        }
        try await prepareChange()
        let old = (l1: image.l1, offset: image.header.l1Offset)
        let kept = try await readL1(of: snapshot)
        let entries = max(kept.count, geometry.l1EntryCount(for: size))
        try await beginChange()
        var place: QCOW2Refcounts.Allocation?
        var isRetained = false
        var table = kept
        do throws(BlockError) {
            let found = try await refcounts.allocate(exactly: l1Clusters(entries))
            place = found
            table = try await changeReferences(of: kept, .retain)
            isRetained = true
            table += [UInt64](repeating: 0, count: entries - table.count)
            try await writeL1(table, to: found)
            try await refcounts.writeBlocks()
            try await file.flush()
            try await switchL1(to: found.offset, entries, size)
        } catch {
            guard image.writeFailure == nil else { throw error }
            if isRetained { _ = try? await changeReferences(of: kept, .release(discards: false)) }
            if let place {
                try? await refcounts.release(place.offset >> geometry.clusterBits, place.count)
            }
            try? await endChange()
            throw error
        }
        for entry in old.l1 { image.removeTable(at: QCOW2.L1Entry(rawValue: entry).offset) }
        for entry in table where QCOW2.L1Entry(rawValue: entry).offset != 0 {
            image.addTable(at: QCOW2.L1Entry(rawValue: entry).offset)
        }
        image.l1 = table
        node.size = size
        do throws(BlockError) {
            let discards = options.passDiscardSnapshot
            _ = try await changeReferences(of: old.l1, .release(discards: discards))
            try await releaseTable(
                old.offset >> geometry.clusterBits, l1Clusters(old.l1.count), discards: discards)
            try await endChange()
        } catch {
            throw error.doing("the snapshot is applied, but space was not given back")
        }
    }

    /// The header names another L1 table, and another size of the disk.
    private func switchL1(
        to offset: Int, _ entries: Int, _ size: Int
    ) async throws(BlockError) {
        image.header.l1Offset = offset
        image.header.l1EntryCount = entries
        image.header.size = size
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            throw await image.corruption("a snapshot's L1 table could not be put in place")
        }
    }

    // MARK: Read

    public func openSnapshot(
        _ identifier: String, for user: BlockNode
    ) async throws(BlockError) -> any SnapshotSource {
        let snapshot = snapshots[try index(of: identifier)]
        // From here on: it must not go while its table is read.
        snapshotUsers.append((snapshot.identifier, user.name))
        do throws(BlockError) {
            let l1 = try await readL1(of: snapshot)
            let size = diskSize(of: snapshot)
            guard size == 0 || l1.count >= geometry.l1EntryCount(for: size) else {
                throw BlockError(
                    .corrupt,
                    "the L1 table of snapshot '\(identifier)' is too short for its disk of "
                        + "\(size) bytes", remedy: "repair the image", node: node.name)
            }
            let reader = QCOW2SnapshotReader(
                self, l1, size: size, user: (snapshot.identifier, user.name))
            snapshotReaders.append(reader)
            return reader
        } catch {
            closeSnapshot(snapshot.identifier, user: user.name)
            throw error
        }
    }

    func closeSnapshot(_ identifier: [UInt8], user: String) {
        if let index = snapshotUsers.firstIndex(where: {
            $0.identifier == identifier && $0.name == user
        }) {
            snapshotUsers.remove(at: index)
        }
    }

    private func checkUnused(
        _ snapshot: QCOW2.Snapshot, _ verb: String
    ) throws(BlockError) {
        let users = snapshotUsers.filter { $0.identifier == snapshot.identifier }
        guard users.isEmpty else {
            let name = String(decoding: snapshot.name, as: UTF8.self)
            throw BlockError(
                .busy,
                "snapshot '\(name)' cannot be \(verb): it is in use by "
                    + users.map { "node '\($0.name)'" }.joined(separator: ", "),
                remedy: "remove its users first", node: node.name)
        }
    }

    private func index(of identifier: String) throws(BlockError) -> Int {
        let bytes = Array(identifier.utf8)
        guard let index = snapshots.firstIndex(where: { $0.identifier == bytes }) else {
            throw BlockError(
                .notFound, "there is no snapshot with id '\(identifier)'", node: node.name)
        }
        return index
    }

    // MARK: Steps

    /// Everything is on disk, and nothing of the L2 tables in memory.
    func prepareChange() async throws(BlockError) {
        if node.isReadOnly {
            throw BlockError(.readOnly, "the image is read-only", node: node.name)
        }
        try checkWritable()
        guard allocations.isEmpty, tablesInCreation.isEmpty else {
            throw BlockError(.busy, "the disk is being written", node: node.name)
        }
        // Twice: what the first gives back changes counts.
        try await commit()
        try await commit()
        guard frozen.isEmpty, l2.dirty.isEmpty else {
            throw BlockError(.busy, "requests of the disk are in flight", node: node.name)
        }
        l2.removeAll()
        decompressed.removeAll()
        try await requireUsedL1()
    }

    /// The L1 table's clusters are in use: where they count as free, another table would be put there.
    ///
    /// - Throws: `corrupt` then; the image is marked.
    func requireUsedL1() async throws(BlockError) {
        try await refcounts.requireUsed(
            image.header.l1Offset >> geometry.clusterBits, l1Clusters(image.l1.count))
    }

    /// From here on an interruption leaves counts and flags that have to be made anew.
    private func beginChange() async throws(BlockError) {
        guard image.header.version == 3 else { return }
        changesReferences = true
        // With lazy refcounts it may be set already; afterwards they are not late any more.
        guard !image.header.incompatible.contains(.dirty) else { return }
        image.header.incompatible.insert(.dirty)
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            // Dirty on disk or not: a copy that is clean is right.
            image.header.incompatible.remove(.dirty)
            changesReferences = false
            throw error
        }
    }

    private func endChange() async throws(BlockError) {
        try await refcounts.writeBlocks()
        try await file.flush()
        guard changesReferences else { return }
        image.header.incompatible.remove(.dirty)
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            image.header.incompatible.insert(.dirty)
            throw error
        }
        changesReferences = false
    }

    /// Puts another snapshot table in place of the one there is.
    ///
    /// - Parameter endsChange: the counts are right with it: the header becomes clean.
    func replaceTable(
        with entries: [QCOW2.Snapshot], endsChange: Bool
    ) async throws(BlockError) {
        let bits = geometry.clusterBits
        let bytes = try QCOW2.Snapshot.serialiseTable(entries)
        var place = ByteRange(0, 0)
        if !bytes.isEmpty {
            let clusters = geometry.clusterCount(for: bytes.count)
            let found = try await refcounts.allocate(exactly: clusters)
            place = ByteRange(found.offset, clusters << bits)
            let padding = [UInt8](repeating: 0, count: place.count - bytes.count)
            do throws(BlockError) {
                try await file.write(place.offset, from: try QCOW2Image.vector(bytes + padding))
                try await refcounts.writeBlocks()
                try await file.flush()
            } catch {
                try? await refcounts.release(place.offset >> bits, clusters)
                throw error
            }
        } else {
            try await refcounts.writeBlocks()
            try await file.flush()
        }
        image.header.snapshotCount = entries.count
        image.header.snapshotsOffset = place.offset
        if endsChange, changesReferences { image.header.incompatible.remove(.dirty) }
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            throw await image.corruption("another snapshot table could not be put in place")
        }
        if endsChange { changesReferences = false }
        let old = snapshotTable
        snapshots = entries
        snapshotTable = place
        try await noteSnapshotClusters()
        if old.count > 0 { try await refcounts.release(old.offset >> bits, old.count >> bits) }
    }

    private func l1Clusters(_ entries: Int) -> Int {
        geometry.clusterCount(for: entries * 8)
    }

    /// Fills the clusters of `place`.
    private func writeL1(
        _ table: [UInt64], to place: QCOW2Refcounts.Allocation
    ) async throws(BlockError) {
        let room = place.count << (geometry.clusterBits - 3)
        let padded = table + [UInt64](repeating: 0, count: room - table.count)
        try await file.write(
            place.offset, from: try QCOW2Image.vector(QCOW2Refcounts.bigEndian(padded[...])))
    }

    func writeActiveL1() async throws(BlockError) {
        if image.l1.isEmpty { return }
        try await image.checkOverlap(
            image.header.l1Offset, image.l1.count * 8, ignoring: .activeL1, "the L1 table")
        try await file.write(
            image.header.l1Offset,
            from: try QCOW2Image.vector(QCOW2Refcounts.bigEndian(image.l1[...])))
    }

    func readL1(of snapshot: QCOW2.Snapshot) async throws(BlockError) -> [UInt64] {
        try checkPlace(of: snapshot)
        return try await Self.readTable(file, snapshot.l1Offset, snapshot.l1EntryCount)
    }

    /// A snapshot's L1 table lies in the file, behind the header: what a repair keeps.
    ///
    /// Otherwise a small file could have as many and as large tables as it says.
    private func checkPlace(of snapshot: QCOW2.Snapshot) throws(BlockError) {
        if snapshot.l1EntryCount == 0 { return }
        let bytes = snapshot.l1EntryCount * 8
        let fault: String
        if snapshot.l1Offset == 0 {
            fault = "over the header"
        } else if snapshot.l1Offset + bytes - file.size >= geometry.clusterSize {
            // The last cluster may be there in part.
            fault = "past the end of the file at \(file.size)"
        } else {
            return
        }
        throw BlockError(
            .corrupt,
            "the L1 table of snapshot '\(QCOW2Check.printable(snapshot.name))', \(bytes) bytes at "
                + "\(snapshot.l1Offset), lies \(fault)",
            remedy: "repair the image", node: node.name)
    }

    // MARK: Resize

    /// Before the disk gets another size, every snapshot has to state its own.
    ///
    /// - Throws: `unsupported` in version 2, whose snapshots need not state it.
    func prepareResize() async throws(BlockError) {
        guard !snapshots.isEmpty else { return }
        guard image.header.version == 3 else {
            throw BlockError(
                .unsupported,
                "an image of qcow2 version 2 with internal snapshots cannot be resized",
                remedy: "delete the snapshots, or bring the image to version 3", node: node.name)
        }
        guard snapshots.contains(where: { $0.diskSize == nil }) else { return }
        var stated = snapshots
        for index in stated.indices { stated[index].stateDiskSize(image.header.size) }
        try await replaceTable(with: stated, endsChange: false)
    }

    // MARK: Open

    /// Reads the snapshot table of an image that was just opened.
    ///
    /// - Parameter writable: the image will be written.
    func loadSnapshots(writable: Bool) async throws(BlockError) {
        let header = image.header
        guard header.snapshotCount > 0 else { return }
        let start = header.snapshotsOffset
        let most = min(QCOW2.Limit.snapshotTableBytesMax, max(0, file.size - start))
        var wanted = min(most, max(4096, header.snapshotCount * 128))
        while true {
            let memory = try IOBuffer(count: max(wanted, 1)).prefix(wanted)
            if wanted > 0 { try await file.read(start, into: IOVector(memory)) }
            let parsed = try QCOW2.Snapshot.parseTable(
                UnsafeRawBufferPointer(memory.bytes), count: header.snapshotCount,
                geometry: geometry)
            if case .entries(let entries, let count) = parsed {
                snapshots = entries
                let clusters = geometry.clusterCount(for: count)
                snapshotTable = ByteRange(start, clusters << geometry.clusterBits)
                break
            }
            guard wanted < most else {
                throw BlockError(
                    .corrupt,
                    "the table of \(header.snapshotCount) snapshots at \(start) is cut short, or "
                        + "longer than \(QCOW2.Limit.snapshotTableBytesMax) bytes",
                    remedy: "repair the image")
            }
            wanted = min(most, wanted * 2)
        }
        // Who only reads the disk needs none of it.
        guard writable else { return }
        for snapshot in snapshots { try checkPlace(of: snapshot) }
        try await noteSnapshotClusters()
    }

    /// Where writes of data must not go.
    private func noteSnapshotClusters() async throws(BlockError) {
        let checked = image.overlapCheck
        guard !checked.isDisjoint(with: .snapshots) else { return }
        var tables: [Range<Int>] = []
        if checked.contains(.snapshotTable) {
            tables.append(snapshotTable.offset..<snapshotTable.end)
        }
        var entriesLeft = QCOW2.Limit.snapshotL2CheckedMax
        for snapshot in snapshots {
            let bytes = l1Clusters(snapshot.l1EntryCount) << geometry.clusterBits
            if checked.contains(.inactiveL1) {
                tables.append(snapshot.l1Offset..<(snapshot.l1Offset + bytes))
            }
            entriesLeft -= snapshot.l1EntryCount
            guard checked.contains(.inactiveL2), entriesLeft >= 0 else { continue }
            for entry in try await readL1(of: snapshot) {
                let table = QCOW2.L1Entry(rawValue: entry).offset
                if table != 0 { tables.append(table..<(table + geometry.clusterSize)) }
            }
        }
        image.setSnapshotTables(tables)
    }
}
