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

    /// Reads the snapshot table and finds what is wrong in it. With repair, entries that lead nowhere
    /// are dropped and incomplete ones completed, in a new table.
    func readSnapshots() async throws(BlockError) {
        guard header.snapshotCount > 0 else { return }
        var source = Source()
        var kept: [UInt8] = []
        var keptCount = 0
        var isChanged = false
        for number in 0..<header.snapshotCount {
            guard let raw = try await nextSnapshot(&source) else {
                corruption(
                    "the snapshot table ends within entry \(number) of \(header.snapshotCount)",
                    mended: mendsErrors)
                isChanged = true
                break
            }
            snapshotTableBytes = source.position
            guard let entry = checkedSnapshot(raw, number) else {
                isChanged = true
                continue
            }
            if entry != raw { isChanged = true }
            if mendsErrors { kept += entry + [UInt8](repeating: 0, count: -entry.count & 7) }
            keptCount += 1
        }
        guard isChanged, mendsErrors else { return }
        newSnapshotTable = kept
        newSnapshotCount = keptCount
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

    /// Notes a snapshot.
    ///
    /// - Returns: its entry as it should be; `nil` where it has to go.
    private func checkedSnapshot(_ raw: [UInt8], _ number: Int) -> [UInt8]? {
        let (offset, entries, idLength, nameLength, extraLength) = raw.withUnsafeBytes { bytes in
            (
                bytes.bigEndian(at: 0, as: UInt64.self),
                Int(bytes.bigEndian(at: 8, as: UInt32.self)),
                Int(bytes.bigEndian(at: 12, as: UInt16.self)),
                Int(bytes.bigEndian(at: 14, as: UInt16.self)),
                Int(bytes.bigEndian(at: 36, as: UInt32.self))
            )
        }
        let extraEnd = Self.fixedBytes + extraLength
        let name = Self.printable(raw[(extraEnd + idLength)..<(extraEnd + idLength + nameLength)])
        guard entries <= QCOW2.Limit.l1TableBytesMax / 8,
            let place = ByteRange(checking: offset, count: entries * 8),
            place.offset.isAligned(to: geometry.clusterSize), place.offset > 0 || entries == 0,
            !mendsErrors || isFree(place)
        else {
            corruption(
                "snapshot '\(name)' has an L1 table of \(entries) entries at \(offset), where none "
                    + "can be", mended: mendsErrors)
            return nil
        }
        snapshots.append(
            Snapshot(name: name, l1Offset: place.offset, l1EntryCount: entries))
        var wanted = extraLength
        if header.version == 3, extraLength < Self.extraBytesMin {
            corruption("snapshot '\(name)' does not tell its disk's size", mended: mendsErrors)
            wanted = Self.extraBytesMin
        } else if extraLength > Self.extraBytesMax {
            corruption(
                "snapshot '\(name)' has \(extraLength) bytes of extra data", mended: mendsErrors)
            wanted = Self.extraBytesMax
        }
        return wanted == extraLength ? raw : resized(raw, extraLength, to: wanted)
    }

    /// Whether a repair can take an L1 table for one: it is in the file, and in no other structure.
    private func isFree(_ place: ByteRange) -> Bool {
        if place.isEmpty { return true }
        let clusters = place.offset >> clusterBits..<((place.end - 1) >> clusterBits + 1)
        return place.end - fileSize < geometry.clusterSize
            && !fixedStructures.contains { $0.overlaps(clusters) }
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
