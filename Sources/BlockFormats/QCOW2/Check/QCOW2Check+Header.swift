import BlockCore
import BlockCrypto

// The header, its extensions, and what hangs on them alone.

extension QCOW2Check {
    /// Sorts out which clusters are taken, whatever else claims them.
    func collectVital() {
        let bytes = min(header.l1EntryCount, geometry.l1EntryCount(for: header.size)) * 8
        vital = [0..<1, clusters(header.l1Offset, bytes)]
        if let place = encryptionPlace { vital.append(clusters(place.offset, place.count)) }
    }

    /// The clusters of a structure.
    func clusters(_ offset: Int, _ count: Int) -> Range<Int> {
        let first = offset >> clusterBits
        guard count > 0, let range = ByteRange(checking: offset, count: count) else {
            return first..<first
        }
        return first..<((range.end - 1) >> clusterBits + 1)
    }

    /// Fields that make no sense beside another.
    func checkFeatures() async throws(BlockError) {
        if header.autoclear.contains(.rawExternalData), !hasDataFile {
            corruption("an external data file is said to be raw, and there is none", mended: true)
            header.autoclear.remove(.rawExternalData)
            headerIsWrong = true
        }
        if hasDataFile, !dataFileIsGiven, (header.dataFileName ?? "").isEmpty {
            // The user knows it, or nobody does.
            corruption("the image has an external data file, and its name is missing")
        }
        let start = try await read(0, min(geometry.clusterSize, max(fileSize, 512)))
        let bytes = UnsafeRawBufferPointer(start.bytes)
        // Nobody reads a table of no snapshots; but readers look at where it is said to be.
        let table: UInt64 = bytes.bigEndian(at: 64)
        let isPlace = table >> 63 == 0 && Int(table).isAligned(to: geometry.clusterSize)
        if header.snapshotCount == 0, !isPlace {
            corruption("the table of no snapshots is at \(table)", mended: true)
            headerIsWrong = true
        }
        checkEndMarker(bytes)
    }

    /// The end marker of the extensions has a length, as every extension: readers look at it.
    private func checkEndMarker(_ bytes: UnsafeRawBufferPointer) {
        var offset = QCOW2.Header.lengthV2
        if header.version == 3 { offset = Int(bytes.bigEndian(at: 100, as: UInt32.self)) }
        let name: UInt64 = bytes.bigEndian(at: 8)
        let end = name == 0 ? bytes.count : min(bytes.count, Int(clamping: name))
        while end - offset >= 8 {
            let type: UInt32 = bytes.bigEndian(at: offset)
            let length = Int(bytes.bigEndian(at: offset + 4, as: UInt32.self))
            if type == 0 {
                if length <= end - offset - 8 { return }
                corruption(
                    "the end of the header extensions is said to have \(length) bytes",
                    mended: true)
                wrongEndMarker = offset
                return
            }
            offset += 8 + (length + 7) & ~7
        }
    }

    // MARK: Keys

    /// Finds the clusters of the keys: nothing else says that they are in use.
    func findEncryptionHeader() async throws(BlockError) {
        guard header.encryptionMethod == QCOW2Encryption.Method.luks.rawValue else { return }
        keysAreKnown = false
        guard let place = header.parseEncryptionHeader() else {
            corruption("the image is encrypted, and it does not say where its keys are")
            return
        }
        encryptionPlace = place
        do throws(BlockError) {
            let area = try await LUKSArea.open(file, place, isDetached: false)
            let slots = area.header.slots.indices
            let end = slots.map { area.header.materialRange(of: $0).end }.max() ?? 0
            keysAreKnown = end <= place.count
            if !keysAreKnown { corruption("the encryption header is longer than its place") }
        } catch {
            corruption(
                "there is no encryption header at \(place.offset), where it should be: "
                    + error.message)
        }
    }

    func countEncryptionHeader(_ counts: QCOW2ReferenceCounts) {
        guard let place = encryptionPlace else { return }
        region(place.offset, place.count, "the encryption header", counts)
    }

    // MARK: Repair

    /// Writes the header's fields, where one of them is wrong.
    func mendHeader() async throws(BlockError) {
        if let place = wrongEndMarker {
            let sector = place.roundedDown(to: 512)
            let memory = try await read(sector, 512)
            memory.bytes.storeBigEndian(UInt32(0), at: place - sector + 4)
            try await file.write(sector, from: IOVector(memory))
            wrongEndMarker = nil
        }
        if headerIsWrong { try await patchHeader() }
        headerIsWrong = false
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
