import BlockCore

/// The qcow2 image format, versions 2 and 3, split by on-disk structure.
///
/// ```
/// cluster 0          anywhere, each starting on a cluster
/// ┌────────────────┐ ┌───────────┐   ┌──────────────┐
/// │ header         │ │ refcount  │──►│ refcount     │  one count for each cluster of the file
/// │ extensions     │ │ table     │   │ blocks       │
/// │ backing name   │ └───────────┘   └──────────────┘
/// └────────────────┘ ┌───────────┐   ┌──────────────┐   ┌───────────────┐
///                    │ L1 table  │──►│ L2 tables    │──►│ data clusters │
///                    └───────────┘   └──────────────┘   └───────────────┘
/// ```
/// All numbers are big-endian. Section names in comments are those of the specification.
enum QCOW2 {
    /// What an image may ask for. Bytes unless the name says otherwise.
    enum Limit {
        static let l1TableBytesMax = 32 << 20
        static let refcountTableBytesMax = 8 << 20
        static let backingNameBytesMax = 1023
        static let clusterBitsMin = 9
        /// With subclusters, which have 512 bytes at least.
        static let subclusteredClusterBitsMin = 14
        static let clusterBitsMax = 21
        static let refcountOrderMax = 6
        static let encryptionHeaderBytesMax = 64 << 20
        static let snapshotCountMax = 65_536
        static let snapshotTableBytesMax = 64 << 20
        /// Of one entry.
        static let snapshotExtraBytesMax = 1024
        /// L1 entries of snapshots whose L2 tables `overlap-check=all` looks after.
        static let snapshotL2CheckedMax = 1 << 22
        /// Of new snapshots: what other tools can show.
        static let snapshotNameBytesMax = 255
        /// Host offsets have 56 bits.
        static let hostOffsetMax = 1 << 56
    }

    static let magic: UInt32 = 0x5146_49fb
}

extension QCOW2 {
    /// The sizes that follow from the header: how offsets split into table indices.
    struct Geometry: Equatable, Sendable {
        let clusterBits: Int
        let refcountOrder: Int
        /// Extended L2 entries: each cluster has 32 subclusters with states of their own.
        var hasSubclusters = false

        @inline(__always) var clusterSize: Int { 1 << clusterBits }
        /// log2 of the bytes of an L2 entry: 8, or 16 with subclusters.
        @inline(__always) var l2EntryShift: Int { hasSubclusters ? 4 : 3 }
        /// log2 of the entries in an L2 table.
        @inline(__always) var l2Bits: Int { clusterBits - l2EntryShift }
        @inline(__always) var l2EntryCount: Int { 1 << l2Bits }
        /// log2 of the bytes that are allocated by themselves: a subcluster, or a cluster.
        @inline(__always) var unitBits: Int { hasSubclusters ? clusterBits - 5 : clusterBits }
        /// log2 of the guest bytes that one L2 table maps.
        @inline(__always) var l2CoverageBits: Int { clusterBits + l2Bits }
        /// log2 of the clusters that one refcount block counts.
        @inline(__always) var refcountBlockBits: Int { clusterBits + 3 - refcountOrder }
        @inline(__always) var clustersPerRefcountBlock: Int { 1 << refcountBlockBits }
        /// The largest count that the width can hold.
        var refcountMax: UInt64 {
            refcountOrder == 6 ? .max : (1 << (1 << UInt64(refcountOrder))) - 1
        }

        /// The L1 entries for a disk of `size` bytes; at least one.
        func l1EntryCount(for size: Int) -> Int {
            max(1, ((size - 1) >> l2CoverageBits) + 1)
        }

        /// Clusters for `bytes`, which is not negative.
        func clusterCount(for bytes: Int) -> Int {
            (bytes >> clusterBits) + (bytes & (clusterSize - 1) == 0 ? 0 : 1)
        }

        /// The largest disk that an L1 table within the limit maps.
        var sizeMax: Int {
            let entries = QCOW2.Limit.l1TableBytesMax / 8
            return entries.multiplied(by: 1 << l2CoverageBits) ?? Limits.nodeSizeMax
        }
    }
}
