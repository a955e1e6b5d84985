import BlockGraph

/// The drivers of this target.
public enum BlockFilters {
    public static let drivers: [DriverDescription] = [
        CopyBeforeWrite.driver, SnapshotAccess.driver, ThrottleFilter.driver, CopyOnRead.driver,
        PreallocateFilter.driver, CompressFilter.driver, BlockDebugFilter.driver,
        BlockVerifyFilter.driver, BlockLogWritesFilter.driver,
    ]
}
