import BlockCore
import BlockGraph

/// The backing file as the header names it, and its change.
extension QCOW2Driver: BackedImage {
    public func setBacking(name: String?, format: String?) async throws(BlockError) {
        try checkWritable()
        var changed = image.header
        changed.backingName = Array((name ?? "").utf8)
        guard changed.backingName.count <= QCOW2.Limit.backingNameBytesMax else {
            throw BlockError(
                .invalidArgument,
                "the backing file name of \(changed.backingName.count) bytes is longer than "
                    + "\(QCOW2.Limit.backingNameBytesMax)")
        }
        changed.extensions.removeAll { $0.type == QCOW2.HeaderExtension.backingFormat }
        if let format, name != nil {
            // First: readers that stop at an extension they do not know have seen it.
            changed.extensions.insert(
                .init(type: QCOW2.HeaderExtension.backingFormat, data: Array(format.utf8)), at: 0)
        }
        // A header that has no room for it is refused before anything changes.
        _ = try changed.serialised()
        try await commit()
        let old = image.header
        image.header = changed
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            image.header = old
            throw error
        }
    }

    public func empty() async throws(BlockError) {
        try checkWritable()
        let mask = geometry.clusterSize - 1
        try await changeEntries((0, (node.size + mask) & ~mask), makesTables: false) { _, _ in
            .init(rawValue: 0)
        }
        try await commit()
        // What the first commit made free is given back by the second.
        try await commit()
    }
}
