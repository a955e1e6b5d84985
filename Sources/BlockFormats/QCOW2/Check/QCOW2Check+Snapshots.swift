import BlockCore

// The snapshot table (§Snapshots).
//
//   0 L1 offset   8 L1 entries   12 id length   14 name length   16 date   24 guest's clock
//  32 VM state   36 length of extra data   40 extra data, id, name, padding to 8 bytes

extension QCOW2Check {
    private static let tableBytesMax = 64 << 20
    private static let fixedBytes = 40
    /// VM state size and disk size, 8 bytes each: what version 3 asks for.
    private static let extraBytesMin = 16
    private static let extraBytesMax = 1024

    /// Reads the table from the file as parsing goes on.
    private struct Source {
        var bytes: [UInt8] = []
        var position = 0
    }

    /// Reads the snapshot table and finds what is wrong in it. A repair leaves out entries that lead
    /// nowhere, and completes incomplete ones, in a new table.
    func readSnapshots() async throws(BlockError) {
        guard header.snapshotCount > 0 else { return }
        let first = header.snapshotsOffset >> clusterBits
        if header.snapshotsOffset >= fileSize {
            return loseSnapshots(from: 0, "is past the end of the file")
        }
        if vital.contains(where: { $0.contains(first) }) {
            return loseSnapshots(from: 0, "lies over the header or the disk's tables")
        }
        var source = Source()
        for number in 0..<header.snapshotCount {
            guard let raw = try await nextSnapshot(&source) else {
                loseSnapshots(from: number, "ends within entry \(number)")
                break
            }
            snapshotTableBytes = source.position
            guard let snapshot = checkedSnapshot(raw) else {
                lacksSnapshots = true
                rewritesSnapshotTable = mendsErrors
                continue
            }
            snapshots.append(snapshot)
            if mendsErrors, snapshot.entry != raw { rewritesSnapshotTable = true }
        }
    }

    /// The entries from `number` on cannot be read: a repair of errors has to do without them.
    private func loseSnapshots(from number: Int, _ fault: String) {
        let lost = header.snapshotCount - number
        let name = lost == 1 ? "1 snapshot" : "\(lost) snapshots"
        corruption(
            "the table of \(header.snapshotCount) snapshots at \(header.snapshotsOffset) \(fault): "
                + (mendsErrors ? "\(name) dropped" : "\(name) cannot be read"), mended: true)
        lacksSnapshots = true
        rewritesSnapshotTable = mendsErrors
    }

    /// What the snapshot table is to become; `nil` while it stays.
    var newSnapshotTable: [UInt8]? {
        guard rewritesSnapshotTable else { return nil }
        return snapshots.reduce(into: []) { table, snapshot in
            table += snapshot.entry
            table += [UInt8](repeating: 0, count: -snapshot.entry.count & 7)
        }
    }

    /// The bytes of the next entry; `nil` where the table or the file ends.
    private func nextSnapshot(_ source: inout Source) async throws(BlockError) -> [UInt8]? {
        guard try await fill(&source, Self.fixedBytes) else { return nil }
        let start = source.position
        let lengths = source.bytes.withUnsafeBytes { bytes in
            (
                Int(bytes.bigEndian(at: start + 12, as: UInt16.self)),
                Int(bytes.bigEndian(at: start + 14, as: UInt16.self)),
                Int(bytes.bigEndian(at: start + 36, as: UInt32.self))
            )
        }
        let count = Self.fixedBytes + lengths.0 + lengths.1 + lengths.2
        guard try await fill(&source, count) else { return nil }
        let raw = Array(source.bytes[start..<(start + count)])
        source.position += (count + 7) & ~7
        return raw
    }

    /// Makes `count` bytes from the source's position on available.
    private func fill(_ source: inout Source, _ count: Int) async throws(BlockError) -> Bool {
        let end = source.position + count
        guard end <= Self.tableBytesMax, header.snapshotsOffset + end <= fileSize else {
            return false
        }
        while source.bytes.count < end {
            let host = header.snapshotsOffset + source.bytes.count
            let part = try await read(host, max(end - source.bytes.count, 64 << 10))
            source.bytes += part.bytes
        }
        return true
    }

    /// The fields of an entry that a check looks at.
    private struct Fields {
        let l1Offset: UInt64
        let entryCount: Int
        let idLength: Int
        let nameLength: Int
        let extraLength: Int
        let diskSize: Int
        let stateSize: Int

        init(_ raw: [UInt8], diskSize size: Int) {
            (l1Offset, entryCount, idLength, nameLength, extraLength) = raw.withUnsafeBytes {
                (
                    $0.bigEndian(at: 0, as: UInt64.self),
                    Int($0.bigEndian(at: 8, as: UInt32.self)),
                    Int($0.bigEndian(at: 12, as: UInt16.self)),
                    Int($0.bigEndian(at: 14, as: UInt16.self)),
                    Int($0.bigEndian(at: 36, as: UInt32.self))
                )
            }
            let length = extraLength
            (stateSize, diskSize) = raw.withUnsafeBytes {
                (
                    length < 8
                        ? Int($0.bigEndian(at: 32, as: UInt32.self))
                        : Int(clamping: $0.bigEndian(at: QCOW2Check.fixedBytes, as: UInt64.self)),
                    length < QCOW2Check.extraBytesMin
                        ? size
                        : Int(
                            clamping: $0.bigEndian(at: QCOW2Check.fixedBytes + 8, as: UInt64.self))
                )
            }
        }

        /// Else it is taken to be the image's, which may have grown since.
        var tellsDiskSize: Bool { extraLength >= QCOW2Check.extraBytesMin }

        /// What lies behind the table's end looks so.
        var isEmpty: Bool {
            l1Offset == 0 && entryCount == 0 && idLength == 0 && nameLength == 0
        }

        /// The L1 entries of the disk, and of the state of its machine behind it.
        func neededEntryCount(_ geometry: QCOW2.Geometry) -> Int {
            let coverage = geometry.l2CoverageBits
            return geometry.l1EntryCount(for: diskSize)
                + (stateSize == 0 ? 0 : (stateSize - 1) >> coverage + 1)
        }
    }

    /// - Returns: the snapshot as it should be; `nil` where it has to go.
    private func checkedSnapshot(_ raw: [UInt8]) -> Snapshot? {
        let fields = Fields(raw, diskSize: header.size)
        let extraLength = fields.extraLength
        let nameStart = Self.fixedBytes + extraLength + fields.idLength
        let name = Self.printable(raw[nameStart..<(nameStart + fields.nameLength)])
        if mendsErrors, fields.isEmpty {
            corruption("an entry of the snapshot table is empty", mended: true)
            return nil
        }
        let needed = fields.neededEntryCount(geometry)
        if !mendsErrors { noteMissing(fields, needed, name) }
        // What is said beyond that may be wrong alone.
        let entries = mendsErrors ? min(fields.entryCount, needed) : fields.entryCount
        guard entries <= QCOW2.Limit.l1TableBytesMax / 8,
            fields.l1Offset < UInt64(QCOW2.Limit.hostOffsetMax),
            let place = ByteRange(checking: fields.l1Offset, count: entries * 8),
            place.offset.isAligned(to: geometry.clusterSize), place.offset > 0 || entries == 0,
            !mendsErrors || isFree(place)
        else {
            corruption(
                "snapshot '\(name)' has an L1 table of \(fields.entryCount) entries at "
                    + "\(fields.l1Offset), where none can be", mended: true)
            return nil
        }
        var snapshot = Snapshot(
            name: name, l1Offset: place.offset, l1EntryCount: fields.entryCount,
            neededEntryCount: needed, entry: mendsErrors ? raw : [])
        var wanted = extraLength
        if header.version == 3, extraLength < Self.extraBytesMin {
            corruption("snapshot '\(name)' does not tell its disk's size", mended: true)
            wanted = Self.extraBytesMin
        } else if extraLength > Self.extraBytesMax {
            corruption(
                "snapshot '\(name)' has \(extraLength) bytes of extra data", mended: true)
            wanted = Self.extraBytesMax
        }
        if mendsErrors, wanted != extraLength {
            snapshot.entry = resized(raw, extraLength, to: wanted)
        }
        return snapshot
    }

    /// What the entry does not lead to may be there all the same: what looks like leaks may be a snapshot's.
    private func noteMissing(_ fields: Fields, _ needed: Int, _ name: String) {
        if fields.isEmpty {
            note("An entry of the snapshot table is empty: its snapshot cannot be read")
            lacksSnapshots = true
        } else if fields.tellsDiskSize, fields.entryCount < needed {
            note(
                "The L1 table of snapshot '\(name)' has \(fields.entryCount) entries, and its disk "
                    + "\(needed): the rest cannot be read")
            lacksSnapshots = true
        }
    }

    /// Whether a repair can take an L1 table for one: it is in the file, and in nothing else for certain.
    private func isFree(_ place: ByteRange) -> Bool {
        if place.isEmpty { return true }
        let clusters = clusters(place.offset, place.count)
        return isInFile(place) && !vital.contains { $0.overlaps(clusters) }
    }

    /// The entry with another length of extra data.
    private func resized(_ raw: [UInt8], _ old: Int, to new: Int) -> [UInt8] {
        var extra = Array(raw[Self.fixedBytes..<(Self.fixedBytes + old)])
        if new < old {
            extra = Array(extra.prefix(new))
        } else {
            // What is missing: the VM state's size, as the old field has it, then the disk's.
            let state: UInt32 = raw.withUnsafeBytes { $0.bigEndian(at: 32) }
            let whole =
                QCOW2Refcounts.bigEndian([UInt64(state), UInt64(header.size)][...])
            extra += whole[old...]
        }
        var result = Array(raw[..<Self.fixedBytes]) + extra
        result += raw[(Self.fixedBytes + old)...]
        result.withUnsafeMutableBytes { $0.storeBigEndian(UInt32(new), at: 36) }
        return result
    }
}
