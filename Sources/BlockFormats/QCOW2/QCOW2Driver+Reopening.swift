import BlockCore
import BlockGraph

// All options can change: everything is written out as for closing, dirty bitmaps included, and a driver
// made from what is in the file takes this one's place. The bitmaps stay on the node, and are what is
// stored: before the next change they are marked in use again.

extension QCOW2Driver {
    public func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening {
        try followStorage(reopening)
        try checkReaders()
        let writable = !reopening.nodeOptions.isReadOnly
        let encryption = try await reopenedEncryption(reopening)
        if writable {
            // From here on they change.
            for bitmap in node.dirtyBitmaps { await bitmap.load() }
        }
        try await writeOutForClosing()
        let header = try await Self.readHeader(file)
        if writable { try checkReopeningWritable(header) }
        let options = try QCOW2Options(
            reading: reopening.options, header, discards: reopening.nodeOptions.discards)
        let driver = try await Self.make(
            node, file, data: hasDataFile ? data : nil, encryption, header, options,
            writable: writable)
        if writable { driver.image.dropUnknownFeatures() }
        var result = DriverReopening()
        result.driver = driver
        result.commit = {
            self.cleaner?.cancel()
            self.handReaders(to: driver)
            if driver.image.headerIsStale { driver.node.awaitsFirstChange = true }
            driver.startCleaning()
        }
        return result
    }

    /// What cannot be written below is not written here.
    private func followStorage(_ reopening: NodeReopening) throws(BlockError) {
        guard !reopening.nodeOptions.isReadOnly else { return }
        if hasDataFile, reopening.isReadOnlyThen(child: data.name) {
            throw BlockError(
                .readOnly, "its external data file will be read-only",
                remedy: "reopen with read-only=on")
        }
        guard reopening.isReadOnlyThen(child: file.name) else { return }
        guard reopening.nodeOptions.autoReadOnly else {
            throw BlockError(
                .readOnly, "its file will be read-only", remedy: "reopen with read-only=on")
        }
        reopening.nodeOptions.isReadOnly = true
    }

    /// The keys stay, unless another secret is named: that is tried now.
    private func reopenedEncryption(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> QCOW2Encryption? {
        let isChanged = reopening.isChanged("encrypt")
        let given = try reopening.options.value("encrypt")
        if encryption != nil, given == nil || !isChanged { return encryption }
        let opened = try await QCOW2Encryption.open(
            image.header, file, reopening.options, for: node)
        return opened?.cipher == nil ? encryption : opened
    }

    /// - Throws: `busy` while somebody is about to read a snapshot of the image.
    func checkReaders() throws(BlockError) {
        guard snapshotUsers.count != snapshotReaders.count, let user = snapshotUsers.last else {
            return
        }
        throw BlockError(
            .busy, "'\(user.name)' is being opened, to read a snapshot of the image")
    }

    /// Those who read snapshots by way of this driver do so by way of `driver` from now on.
    func handReaders(to driver: QCOW2Driver) {
        driver.snapshotUsers = snapshotUsers
        driver.snapshotReaders = snapshotReaders
        for reader in snapshotReaders { reader.follow(driver) }
        snapshotUsers = []
        snapshotReaders = []
    }

    /// - Throws: when the image cannot be written after a reopening.
    private func checkReopeningWritable(_ header: QCOW2.Header) throws(BlockError) {
        if let failure = image.writeFailure { throw failure }
        guard node.isReadOnly else { return }
        let remedy = "close it, and open it again with read-only=off"
        // The file cannot be written yet.
        if header.incompatible.contains(.dirty) {
            throw BlockError(
                .unsupported,
                "the image was not closed cleanly: it has to be put in order before it is written",
                remedy: remedy)
        }
        if node.options.sharesAll || file.node.options.sharesAll {
            throw BlockError(
                .unsupported, "others may be writing the image, as it was opened with force-share",
                remedy: remedy)
        }
    }
}
