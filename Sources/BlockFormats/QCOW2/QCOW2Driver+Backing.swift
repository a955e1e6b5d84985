import BlockCore
import BlockGraph

/// The backing file as the header names it, and its change.
extension QCOW2Driver: BackedImage {
    public func setBacking(name: String?, format: String?) async throws(BlockError) {
        try checkWritable()
        let bytes = Array((name ?? "").utf8)
        guard bytes.isEmpty || !isRawDataFile else { throw Self.rawDataFileOverBacking }
        guard bytes.count <= QCOW2.Limit.backingNameBytesMax else {
            throw BlockError(
                .invalidArgument,
                "the backing file name of \(bytes.count) bytes is longer than "
                    + "\(QCOW2.Limit.backingNameBytesMax)")
        }
        func change(_ header: inout QCOW2.Header) {
            header.backingName = bytes
            header.extensions.removeAll { $0.type == QCOW2.HeaderExtension.backingFormat }
            if let format, name != nil {
                // First: readers that stop at an extension they do not know have seen it.
                header.extensions.insert(
                    .init(type: QCOW2.HeaderExtension.backingFormat, data: Array(format.utf8)),
                    at: 0)
            }
        }
        // A header that has no room for it is refused before anything changes.
        var trial = image.header
        change(&trial)
        _ = try trial.serialised()
        // It may change the header itself: what it says then stays.
        try await commit()
        try await rewriteHeader(change)
    }

    static var rawDataFileOverBacking: BlockError {
        BlockError(
            .invalidArgument,
            "the image's data file is a raw image of the whole disk: it cannot have a backing file",
            remedy: "give up the raw file first, with data-file-raw=off")
    }

    public func empty() async throws(BlockError) {
        try checkWritable()
        let mask = geometry.clusterSize - 1
        try await changeEntries((0, (node.size + mask) & ~mask), whereNone: .skip) { _, _ in
            .init(rawValue: 0)
        }
        try await commit()
        // What the first commit made free is given back by the second.
        try await commit()
    }
}
