import BlockCore

extension QCOW2 {
    /// An entry of the L1 table (§L1 table entry).
    struct L1Entry: Equatable, Sendable {
        static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00
        static let copiedFlag: UInt64 = 1 << 63

        var rawValue: UInt64

        @inline(__always) init(rawValue: UInt64) { self.rawValue = rawValue }
        /// A table that nothing else uses.
        @inline(__always) init(table offset: Int) {
            rawValue = UInt64(offset) | Self.copiedFlag
        }

        /// Where the L2 table is; 0 when there is none.
        @inline(__always) var offset: Int { Int(rawValue & Self.offsetMask) }
        /// The table's refcount is exactly one.
        @inline(__always) var isCopied: Bool { rawValue & Self.copiedFlag != 0 }
    }

    /// An entry of an L2 table (§L2 table entry).
    struct L2Entry: Equatable, Sendable {
        static let copiedFlag: UInt64 = 1 << 63
        static let compressedFlag: UInt64 = 1 << 62
        static let zeroFlag: UInt64 = 1
        static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00

        enum Kind: UInt8, Sendable {
            /// Not in this image: the backing file's, or zeroes.
            case unallocated
            case normal
            case compressed
            /// Reads as zeroes, with no cluster.
            case zeroPlain
            /// Reads as zeroes, with a cluster kept for it.
            case zeroAllocated
        }

        /// Of the subclusters (§Extended L2 entries): bits 0–31 are set for those that are
        /// allocated, bits 32–63 for those that read as zeroes.
        static let allAllocated: UInt64 = 0x0000_0000_ffff_ffff
        static let allZero: UInt64 = 0xffff_ffff_0000_0000

        var rawValue: UInt64
        /// The states of the subclusters; 0 where there are none.
        var bitmap: UInt64 = 0

        @inline(__always) init(rawValue: UInt64, bitmap: UInt64 = 0) {
            self.rawValue = rawValue
            self.bitmap = bitmap
        }
        /// A data cluster that nothing else uses.
        @inline(__always) init(cluster offset: Int, bitmap: UInt64 = 0) {
            rawValue = UInt64(offset) | Self.copiedFlag
            self.bitmap = bitmap
        }

        /// An entry that reads as zeroes, in a cluster kept for it, or in none.
        static func zero(
            keeping rawValue: UInt64 = 0, hasSubclusters: Bool
        ) -> L2Entry {
            hasSubclusters
                ? L2Entry(rawValue: rawValue, bitmap: allZero)
                : L2Entry(rawValue: rawValue | zeroFlag)
        }

        @inline(__always) var isCopied: Bool { rawValue & Self.copiedFlag != 0 }
        @inline(__always) var isCompressed: Bool { rawValue & Self.compressedFlag != 0 }
        @inline(__always) var isZero: Bool { rawValue & Self.zeroFlag != 0 }
        /// Of a standard cluster; 0 when there is none.
        @inline(__always) var offset: Int { Int(rawValue & Self.offsetMask) }

        /// The state of subcluster `index`.
        ///
        /// - Parameter hasDataFile: data is in a file of its own, where a cluster may be at 0.
        @inline(__always)
        func kind(ofSubcluster index: Int, hasDataFile: Bool = false) -> Kind {
            if isCompressed { return .compressed }
            if bitmap & (1 << UInt64(32 + index)) != 0 {
                return offset == 0 ? .zeroPlain : .zeroAllocated
            }
            // Allocated, without a cluster, there is none in an image that is whole.
            let hasCluster = offset != 0 || hasDataFile && isCopied
            return bitmap & (1 << UInt64(index)) != 0 && hasCluster ? .normal : .unallocated
        }

        /// The state of the whole cluster; with subclusters, whether there is a cluster: `normal`.
        ///
        /// - Parameters:
        ///   - hasZeroFlag: version 3.
        ///   - hasDataFile: data is in a file of its own, where a cluster may be at 0.
        @inline(__always)
        func kind(hasZeroFlag: Bool, hasDataFile: Bool = false) -> Kind {
            if isCompressed { return .compressed }
            if hasZeroFlag, isZero { return offset == 0 ? .zeroPlain : .zeroAllocated }
            return offset == 0 && !(hasDataFile && isCopied) ? .unallocated : .normal
        }
    }

    /// Where a compressed cluster is (§Compressed clusters descriptor).
    struct CompressedDescriptor: Equatable, Sendable {
        /// In bytes, with no alignment.
        var offset: Int
        /// Sectors of 512 bytes that it touches after the one it begins in.
        var additionalSectors: Int

        init(_ entry: L2Entry, clusterBits: Int) {
            let bits = UInt64(62 - (clusterBits - 8))
            offset = Int(entry.rawValue & ((1 << bits) - 1))
            additionalSectors = Int(
                (entry.rawValue & ~(L2Entry.copiedFlag | L2Entry.compressedFlag)) >> bits)
        }

        /// Bytes to read from `offset` on; the stream ends within them.
        var byteCount: Int { (additionalSectors + 1) * 512 - (offset & 511) }
    }

    /// Counts in a refcount block (§Refcount table and blocks), for all widths.
    ///
    /// Widths below a byte fill each byte from its least significant bits on.
    enum Refcount {
        @inline(__always)
        static func get(_ block: UnsafeRawBufferPointer, _ index: Int, order: Int) -> UInt64 {
            switch order {
            case 4: return UInt64(block.bigEndian(at: index << 1, as: UInt16.self))
            case 3: return UInt64(block[index])
            case 5: return UInt64(block.bigEndian(at: index << 2, as: UInt32.self))
            case 6: return block.bigEndian(at: index << 3, as: UInt64.self)
            default:
                let bits = 1 << order
                let bit = index << order
                return UInt64((block[bit >> 3] >> UInt8(bit & 7)) & UInt8((1 << bits) - 1))
            }
        }

        /// `value` fits the width.
        @inline(__always)
        static func set(
            _ block: UnsafeMutableRawBufferPointer, _ index: Int, to value: UInt64, order: Int
        ) {
            switch order {
            case 4: block.storeBigEndian(UInt16(truncatingIfNeeded: value), at: index << 1)
            case 3: block[index] = UInt8(truncatingIfNeeded: value)
            case 5: block.storeBigEndian(UInt32(truncatingIfNeeded: value), at: index << 2)
            case 6: block.storeBigEndian(value, at: index << 3)
            default:
                let bit = index << order
                let mask = UInt8((1 << (1 << order)) - 1) << UInt8(bit & 7)
                let old = block[bit >> 3] & ~mask
                block[bit >> 3] = old | (UInt8(truncatingIfNeeded: value) << UInt8(bit & 7)) & mask
            }
        }

        /// The first count of zero in `[start, end)`.
        static func firstZero(
            _ block: UnsafeRawBufferPointer, from start: Int, to end: Int, order: Int
        ) -> Int? {
            var index = start
            while index < end {
                if get(block, index, order: order) == 0 { return index }
                index += 1
            }
            return nil
        }
    }
}
