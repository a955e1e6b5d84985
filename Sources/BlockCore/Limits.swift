/// Every bound on what an image, a peer or a user may ask for, by name, in one place.
///
/// Units are bytes unless the name says otherwise. A driver's own format limits stand in the driver.
public enum Limits {
    /// The largest size of a node: 2⁶³ − 1 rounded down to a sector.
    public static let nodeSizeMax = Int.max & ~511
    /// The largest single read or write that crosses an edge.
    public static let requestBytesMax = 0x7fff_fe00
    /// Node names: this many ASCII characters at most.
    public static let nodeNameLengthMax = 31
    /// Nodes in one graph.
    public static let nodeCountMax = 65_536
    /// How deep a chain of nodes (backing files, filters) may be.
    public static let graphDepthMax = 1_024
    /// How deep JSON from a user or a stored name may nest.
    public static let jsonDepthMax = 128
    /// One JSON document: a QMP command or a `json:` name.
    public static let jsonBytesMax = 8 << 20
    /// Values in one JSON document.
    public static let jsonValueCountMax = 200_000
    /// What is read without waiting moves less than this at a time, so that others get their turn.
    public static let immediateBytesMax = 512 << 10
    /// A file or export name that came from an image or a user.
    public static let nameLengthMax = 4_096
    /// Dirty bitmap names, in bytes.
    public static let bitmapNameLengthMax = 1_023
    /// Dirty bitmaps of one node.
    public static let bitmapCountMax = 65_535
    /// Bits of one bitmap: 512 MiB of memory; 64 TiB in units of 16 KiB.
    public static let bitmapBitCountMax = 1 << 32
    /// Jobs at a time, those that have concluded and were not dismissed among them.
    public static let jobCountMax = 1_024
    /// What the buffer pool keeps for reuse.
    public static let bufferPoolBytesMax = 8 << 20
    /// The same while an image is copied or compared: all that the requests in flight need.
    public static let busyBufferPoolBytesMax = 64 << 20
}
