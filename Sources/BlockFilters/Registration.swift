import BlockGraph

/// The drivers of this target.
public enum BlockFilters {
    public static let drivers: [DriverDescription] = [
        CopyBeforeWrite.driver, SnapshotAccess.driver,
    ]
}
