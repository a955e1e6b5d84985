import BlockCore
import BlockGraph

extension QCOW2Driver {
    /// All options can change: everything is written out as for closing, and a driver made from what
    /// is in the file takes this one's place.
    public func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening {
        if reopening.isReadOnlyThen(child: file.name), !reopening.nodeOptions.isReadOnly {
            guard reopening.nodeOptions.autoReadOnly else {
                throw BlockError(
                    .readOnly, "its file will be read-only", remedy: "reopen with read-only=on")
            }
            reopening.nodeOptions.isReadOnly = true
        }
        if isEncrypted {
            throw BlockError(
                .unsupported, "an encrypted image cannot be reopened yet",
                remedy: "close it, and open it again")
        }
        try checkReaders()
        let writable = !reopening.nodeOptions.isReadOnly
        try await writeOutForClosing()
        let header = try await Self.readHeader(file)
        if writable { try checkReopeningWritable(header) }
        let driver = try await Self.make(
            node, file, data: hasDataFile ? data : nil, nil, header, reopening.options,
            writable: writable, discards: reopening.nodeOptions.discards)
        var result = DriverReopening()
        result.driver = driver
        result.commit = {
            self.cleaner?.cancel()
            driver.startCleaning()
        }
        return result
    }

    /// - Throws: `busy` while somebody reads a snapshot of the image, and `unsupported` for images that
    ///   keep dirty bitmaps: both by way of this driver.
    private func checkReaders() throws(BlockError) {
        guard !image.header.hasBitmaps, !node.dirtyBitmaps.contains(where: \.isPersistent) else {
            throw BlockError(
                .unsupported, "the image keeps dirty bitmaps, which do not follow it yet",
                remedy: "close it, and open it again")
        }
        guard let reader = snapshotUsers.first else { return }
        throw BlockError(
            .busy, "'\(reader.name)' reads a snapshot of the image", remedy: "close that node first"
        )
    }

    /// - Throws: when the image cannot be written after a reopening.
    private func checkReopeningWritable(_ header: QCOW2.Header) throws(BlockError) {
        if let failure = image.writeFailure { throw failure }
        guard node.isReadOnly else { return }
        let remedy = "close it, and open it again with read-only=off"
        // The file cannot be written yet.
        if header.incompatible.contains(.dirty)
            || !header.autoclear.subtracting(.known).isEmpty
        {
            throw BlockError(
                .unsupported,
                "the image was not closed cleanly, or by a program that knows more of it: it has to "
                    + "be put in order before it is written", remedy: remedy)
        }
        if node.options.sharesAll || file.node.options.sharesAll {
            throw BlockError(
                .unsupported, "others may be writing the image, as it was opened with force-share",
                remedy: remedy)
        }
    }
}
