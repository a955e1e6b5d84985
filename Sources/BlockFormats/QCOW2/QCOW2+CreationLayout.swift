import BlockCore

extension QCOW2 {
    /// Where everything of a new image goes, as pure numbers.
    ///
    /// ```
    /// header │ refcount table │ refcount blocks │ L1 table │ LUKS │ L2 tables │ data
    /// └────────────────── every cluster up to `end` has refcount 1 ──────────┘
    /// ```
    /// The LUKS header is there in encrypted images; L2 tables and data in preallocated ones.
    struct CreationLayout: Equatable, Sendable {
        let geometry: Geometry
        let size: Int
        let refcountTableClusters: Int
        let refcountBlockCount: Int
        let l1EntryCount: Int
        let l1Clusters: Int
        let encryptionClusters: Int
        let l2TableCount: Int
        let dataClusterCount: Int
        /// The data clusters are in a file of their own, each at its guest offset.
        let hasDataFile: Bool
        /// Clusters have a place, and yet show what is below: their subclusters are not there.
        let showsBacking: Bool

        var refcountTableOffset: Int { 1 << geometry.clusterBits }
        var refcountBlocksOffset: Int {
            refcountTableOffset + refcountTableClusters << geometry.clusterBits
        }
        var l1Offset: Int { refcountBlocksOffset + refcountBlockCount << geometry.clusterBits }
        var encryptionOffset: Int { l1Offset + l1Clusters << geometry.clusterBits }
        var l2Offset: Int { encryptionOffset + encryptionClusters << geometry.clusterBits }
        var dataOffset: Int { l2Offset + l2TableCount << geometry.clusterBits }
        var end: Int {
            dataOffset + (hasDataFile ? 0 : dataClusterCount << geometry.clusterBits)
        }
        var clusterCount: Int { end >> geometry.clusterBits }

        /// - Throws: `invalidArgument` when the disk is too large for the cluster size.
        init(
            size: Int, geometry: Geometry, isPreallocated: Bool, hasDataFile: Bool = false,
            encryptionBytes: Int = 0, showsBacking: Bool = false
        ) throws(BlockError) {
            self.geometry = geometry
            self.size = size
            guard size <= geometry.sizeMax else {
                throw BlockError(
                    .invalidArgument,
                    "a disk of \(SizeText.format(size)) is too large for clusters "
                        + "of \(geometry.clusterSize) bytes: at most "
                        + SizeText.format(geometry.sizeMax),
                    remedy: "use larger clusters")
            }
            l1EntryCount = geometry.l1EntryCount(for: size)
            l1Clusters = geometry.clusterCount(for: l1EntryCount * 8)
            encryptionClusters = geometry.clusterCount(for: encryptionBytes)
            self.hasDataFile = hasDataFile
            self.showsBacking = showsBacking
            dataClusterCount = isPreallocated ? geometry.clusterCount(for: size) : 0
            l2TableCount = dataClusterCount == 0 ? 0 : l1EntryCount
            // Refcounts count themselves: grow until they cover all.
            let others =
                1 + l1Clusters + encryptionClusters + l2TableCount
                + (hasDataFile ? 0 : dataClusterCount)
            var blocks = 0
            var tables = 1
            while true {
                let total = others + blocks + tables
                let needed = (total - 1) >> geometry.refcountBlockBits + 1
                let neededTables = geometry.clusterCount(for: needed * 8)
                if needed == blocks, neededTables == tables { break }
                blocks = max(needed, blocks)
                tables = max(neededTables, tables)
                if needed < blocks, neededTables <= tables { break }
            }
            refcountBlockCount = blocks
            refcountTableClusters = tables
            guard tables << geometry.clusterBits <= Limit.refcountTableBytesMax,
                dataOffset <= Limits.nodeSizeMax - size
            else {
                throw BlockError(
                    .invalidArgument, "the image would need a refcount table above 8 MiB",
                    remedy: "use larger clusters or narrower refcounts")
            }
        }

        /// Entry `index` of the refcount table.
        func refcountBlockOffset(_ index: Int) -> Int {
            refcountBlocksOffset + index << geometry.clusterBits
        }

        /// The L1 table in host order.
        var l1Table: [UInt64] {
            (0..<l1EntryCount).map { index in
                index < l2TableCount
                    ? L1Entry(table: l2Offset + index << geometry.clusterBits).rawValue : 0
            }
        }

        /// Fills L2 table `index`.
        func fillL2(_ table: UnsafeMutableRawBufferPointer, _ index: Int) {
            let first = index << geometry.l2Bits
            for entry in 0..<geometry.l2EntryCount {
                let cluster = first + entry
                var value = L2Entry(rawValue: 0)
                if cluster < dataClusterCount {
                    value = L2Entry(
                        cluster: (hasDataFile ? 0 : dataOffset) + cluster << geometry.clusterBits,
                        bitmap: geometry.hasSubclusters && !showsBacking
                            ? L2Entry.allAllocated : 0)
                    // Zeroes in the file would be decrypted to noise.
                    if encryptionClusters > 0, !showsBacking {
                        value = .zero(
                            keeping: value.rawValue, hasSubclusters: geometry.hasSubclusters)
                    }
                }
                table.storeBigEndian(value.rawValue, at: entry << geometry.l2EntryShift)
                guard geometry.hasSubclusters else { continue }
                table.storeBigEndian(value.bitmap, at: entry << geometry.l2EntryShift + 8)
            }
        }

        /// Fills refcount block `index`.
        func fillRefcounts(_ block: UnsafeMutableRawBufferPointer, _ index: Int) {
            let first = index << geometry.refcountBlockBits
            for entry in 0..<geometry.clustersPerRefcountBlock {
                Refcount.set(
                    block, entry, to: first + entry < clusterCount ? 1 : 0,
                    order: geometry.refcountOrder)
            }
        }
    }
}
