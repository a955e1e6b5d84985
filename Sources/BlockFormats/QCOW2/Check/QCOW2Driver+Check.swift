import BlockCore
import BlockGraph

extension QCOW2Driver {
    /// Checks the image as it is in use: what is in memory is written out first. The node is drained:
    /// requests in flight would look like leaks.
    ///
    /// - Throws: `busy` for a repair: that needs the image for itself.
    public func check(
        _ repair: CheckRepair, _ notice: @escaping CheckNotice
    ) async throws(BlockError) -> CheckReport {
        guard repair.isEmpty else {
            throw BlockError(
                .busy, "an image that is in use cannot be repaired",
                remedy: "close it first")
        }
        if !node.isReadOnly, image.writeFailure == nil {
            // Twice: what the first gives back changes counts.
            try await commit()
            try await commit()
            try await refcounts.writeBlocks()
            try await file.flush()
        }
        let check = QCOW2Check(file, image.header, thread: thread, repair: [], notice: notice)
        check.dataFileIsGiven = true
        return try await check.run()
    }
}
