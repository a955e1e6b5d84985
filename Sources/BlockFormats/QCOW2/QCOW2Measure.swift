import BlockCore
import BlockGraph
import QMP

/// Works out the storage that a new image will take.
enum QCOW2Measure {
    /// - Parameter options: creation options, `size` among them.
    static func measure(_ options: OptionReader) throws(BlockError) -> StorageNeed {
        guard let size = try options.size("size") else {
            throw BlockError(.invalidArgument, "option 'size' is missing")
        }
        let preallocation =
            try options.enumeration("preallocation", as: Preallocation.self) ?? .off
        let header = try QCOW2Creation.header(options, size: size, preallocation)
        let encryptionBytes = try QCOW2EncryptionCreation.headerBytes(options)
        // Counted as if the data were in the image: where else it goes is not known here.
        _ = try options.value("data-file")
        _ = try options.bool("data-file-raw")
        try options.finish()
        // Tables for a disk that is full: data may come anywhere.
        let layout = try QCOW2.CreationLayout(
            size: size, geometry: header.geometry, isPreallocated: true,
            encryptionBytes: encryptionBytes)
        let data = layout.dataClusterCount << header.clusterBits
        // An empty disk needs no L1 table to be read, though images are made with one.
        let unneeded = size == 0 ? layout.l1Clusters << header.clusterBits : 0
        let end = layout.end - unneeded
        let reservesAll = preallocation == .falloc || preallocation == .full
        return StorageNeed(
            fixedBytes: reservesAll ? end : end - data,
            unit: reservesAll ? 0 : 1 << header.clusterBits, fullBytes: end)
    }
}
