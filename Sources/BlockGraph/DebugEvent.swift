import BlockCore

/// Points in a driver's work that a `blkdebug` node below it is told of, by QEMU's names.
public enum DebugEvent: String, Sendable, CaseIterable {
    case l1Update = "l1_update"
    case l1GrowAllocTable = "l1_grow_alloc_table"
    case l1GrowWriteTable = "l1_grow_write_table"
    case l1GrowActivateTable = "l1_grow_activate_table"
    case l2Load = "l2_load"
    case l2Update = "l2_update"
    case l2UpdateCompressed = "l2_update_compressed"
    case l2AllocCowRead = "l2_alloc_cow_read"
    case l2AllocWrite = "l2_alloc_write"
    case readAIO = "read_aio"
    case readBackingAIO = "read_backing_aio"
    case readCompressed = "read_compressed"
    case writeAIO = "write_aio"
    case writeCompressed = "write_compressed"
    case vmstateLoad = "vmstate_load"
    case vmstateSave = "vmstate_save"
    case cowRead = "cow_read"
    case cowWrite = "cow_write"
    case reftableLoad = "reftable_load"
    case reftableGrow = "reftable_grow"
    case reftableUpdate = "reftable_update"
    case refblockLoad = "refblock_load"
    case refblockUpdate = "refblock_update"
    case refblockUpdatePart = "refblock_update_part"
    case refblockAlloc = "refblock_alloc"
    case refblockAllocHookup = "refblock_alloc_hookup"
    case refblockAllocWrite = "refblock_alloc_write"
    case refblockAllocWriteBlocks = "refblock_alloc_write_blocks"
    case refblockAllocWriteTable = "refblock_alloc_write_table"
    case refblockAllocSwitchTable = "refblock_alloc_switch_table"
    case clusterAlloc = "cluster_alloc"
    case clusterAllocBytes = "cluster_alloc_bytes"
    case clusterFree = "cluster_free"
    case flushToOS = "flush_to_os"
    case flushToDisk = "flush_to_disk"
    case pwritevRMWHead = "pwritev_rmw_head"
    case pwritevRMWAfterHead = "pwritev_rmw_after_head"
    case pwritevRMWTail = "pwritev_rmw_tail"
    case pwritevRMWAfterTail = "pwritev_rmw_after_tail"
    case pwritev = "pwritev"
    case pwritevZero = "pwritev_zero"
    case pwritevDone = "pwritev_done"
    case emptyImagePrepare = "empty_image_prepare"
    case l1ShrinkWriteTable = "l1_shrink_write_table"
    case l1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters"
    case corWrite = "cor_write"
    case clusterAllocSpace = "cluster_alloc_space"
    case none = "none"
}

/// Told of events at its node: blkdebug.
public protocol DebugEventWatcher: AnyObject {
    /// The work that got there goes on when this returns.
    func reached(_ event: DebugEvent) async
}

extension Edge {
    /// Tells the node behind the edge, if it is a blkdebug, that its parent got to `event`. Costs a load
    /// where it is none.
    @inline(__always)
    public func reached(_ event: DebugEvent) async {
        if let watcher = node.eventWatcher { await watcher.reached(event) }
    }
}
