import BlockCore
import BlockGraph
import BlockIO

// Refcounts of another width. The references are counted anew, and their counts written with the new
// width beside all that is there; then the header, one sector, names them. Cut short before that, the
// image is as it was.

extension QCOW2Check {
    /// Gives the image in `file` refcounts of `1 << order` bits. Nothing is in memory only, and nobody
    /// writes it meanwhile.
    ///
    /// - Parameter switches: called before the header is written: what throws after it leaves unknown
    ///   which refcounts the image has.
    /// - Throws: `corrupt` when the image has to be repaired first, `unsupported` when a cluster has more
    ///   references than fit.
    static func changeWidth(
        of header: QCOW2.Header, in file: Edge, toOrder order: Int, on thread: IOThread,
        switches: @escaping () -> Void
    ) async throws(BlockError) {
        var wider = header
        wider.refcountOrder = order
        let check = QCOW2Check(file, wider, thread: thread, repair: []) { _ in }
        check.willSwitch = switches
        try await check.changeWidth()
    }

    private func changeWidth() async throws(BlockError) {
        refcountTable = try await table(
            header.refcountTableOffset, header.refcountTableClusters << (clusterBits - 3))
        try await findEncryptionHeader()
        try await readSnapshots()
        try await readBitmaps()
        try await survey()
        // With the old refcounts: their place is taken until the header has changed.
        try await forEachWindow(withRefcounts: true) { counts throws(BlockError) in
            try self.checkWidth(counts)
        }
        guard report.corruptions == 0, report.checkErrors == 0 else {
            throw BlockError(
                .corrupt, "the image has errors, which its new refcounts would keep",
                remedy: "check -r all first")
        }
        try await rebuild()
    }

    private func checkWidth(_ counts: QCOW2ReferenceCounts) throws(BlockError) {
        var rest = counts.window
        while let cluster = counts.firstUsed(in: rest) {
            let count = counts.count(of: cluster)
            guard count <= geometry.refcountMax else {
                throw BlockError(
                    .unsupported,
                    "cluster \(cluster) has \(count) references, more than refcounts of "
                        + "\(1 << geometry.refcountOrder) bits can count",
                    remedy: "delete snapshots first")
            }
            rest = (cluster + 1)..<rest.upperBound
        }
    }
}
