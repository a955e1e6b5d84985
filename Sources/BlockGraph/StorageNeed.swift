/// How much storage an image will take, worked out before it is made.
public struct StorageNeed: Sendable, Equatable {
    /// What it takes however little data there is: headers, and the tables for all of the disk.
    public var fixedBytes: Int
    /// Data is stored in units of so many bytes; 0: the fixed part has room for all of it.
    public var unit: Int
    /// What it takes with data everywhere; internal snapshots and the like come on top.
    public var fullBytes: Int

    public init(fixedBytes: Int, unit: Int, fullBytes: Int) {
        self.fixedBytes = fixedBytes
        self.unit = unit
        self.fullBytes = fullBytes
    }
}
