import BlockGraph

/// The drivers of this target.
public enum BlockFormats {
    public static let drivers: [DriverDescription] = [
        RawDriver.driver, QCOW2Driver.driver, LUKSDriver.driver,
    ]
}
