import BlockCore
import QMP

/// The driver's own options, with their defaults worked out.
struct QCOW2Options {
    static let l2CacheBytesMax = 32 << 20
    static let cacheBytesLimit = 1 << 30
    /// Small slices: what is not asked for is not read, and a flush writes little.
    static let l2SliceBytesDefault = 4096

    var l2CacheBytes: Int
    var l2SliceBytes: Int
    var refcountCacheBytes: Int
    /// Seconds after which an unused slice is dropped; 0 for never.
    var cacheCleanInterval: Int
    /// `nil`: as the image says.
    var lazyRefcounts: Bool?
    var overlapCheck: QCOW2OverlapCheck
    var passDiscardRequest: Bool
    var passDiscardSnapshot: Bool
    var passDiscardOther: Bool
    var discardNoUnref: Bool

    /// - Parameter discards: the node passes discards on (`discard=unmap`).
    init(
        reading options: OptionReader, _ header: QCOW2.Header, discards: Bool
    ) throws(BlockError) {
        let geometry = header.geometry
        l2SliceBytes = Self.l2SliceBytesDefault
        if let value = try options.size("l2-cache-entry-size") {
            guard value.isPowerOfTwo, value >= 512, value <= geometry.clusterSize else {
                throw BlockError(
                    .invalidArgument,
                    "'l2-cache-entry-size' must be a power of two from 512 to the "
                        + "cluster size \(geometry.clusterSize), not \(value)")
            }
            l2SliceBytes = value
        }
        // Entries for the whole disk, where that is not much.
        let wholeDisk =
            (geometry.clusterCount(for: header.size) << geometry.l2EntryShift) + 16 * l2SliceBytes
        l2CacheBytes = min(wholeDisk, Self.l2CacheBytesMax)
        refcountCacheBytes = max(4 * geometry.clusterSize, 256 << 10)
        let total = try options.size("cache-size")
        let l2 = try options.size("l2-cache-size")
        let refcount = try options.size("refcount-cache-size")
        if let total {
            guard (l2 ?? 0).adding(refcount ?? 0) ?? .max <= total, l2 == nil || refcount == nil
            else {
                throw BlockError(
                    .invalidArgument,
                    "'cache-size' must hold 'l2-cache-size' and "
                        + "'refcount-cache-size', of which one at most may be given with it")
            }
            l2CacheBytes = l2 ?? min(wholeDisk, total - (refcount ?? 0))
            refcountCacheBytes = refcount ?? min(refcountCacheBytes, total - l2CacheBytes)
        } else {
            l2CacheBytes = l2 ?? l2CacheBytes
            refcountCacheBytes = refcount ?? refcountCacheBytes
        }
        guard l2CacheBytes <= Self.cacheBytesLimit, refcountCacheBytes <= Self.cacheBytesLimit
        else {
            throw BlockError(.invalidArgument, "a metadata cache above 1 GiB is out of bounds")
        }
        cacheCleanInterval = try options.int("cache-clean-interval") ?? 600
        guard cacheCleanInterval >= 0, cacheCleanInterval <= Int(Int32.max) else {
            throw BlockError(.invalidArgument, "'cache-clean-interval' is out of bounds")
        }
        lazyRefcounts = try options.bool("lazy-refcounts")
        if lazyRefcounts == true, header.version < 3 {
            throw BlockError(.invalidArgument, "lazy refcounts need version 3 of qcow2")
        }
        overlapCheck = try QCOW2OverlapCheck.read(options)
        passDiscardRequest = try options.bool("pass-discard-request") ?? discards
        passDiscardSnapshot = try options.bool("pass-discard-snapshot") ?? true
        passDiscardOther = try options.bool("pass-discard-other") ?? false
        discardNoUnref = try options.bool("discard-no-unref") ?? false
        if discardNoUnref, header.version < 3 {
            throw BlockError(.invalidArgument, "'discard-no-unref' needs version 3 of qcow2")
        }
    }
}
