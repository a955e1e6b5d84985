import BlockCore
import QMP

/// How a read is done.
public struct ReadFlags: OptionSet, Sendable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Read for the effect on caches only: the data is thrown away.
    public static let prefetch = ReadFlags(rawValue: 1)
}

/// How a write or a write of zeroes is done.
public struct WriteFlags: OptionSet, Sendable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// On stable storage before the request completes.
    public static let fua = WriteFlags(rawValue: 1)
    /// Zeroes may give the space back.
    public static let mayUnmap = WriteFlags(rawValue: 2)
    /// Zeroes only if that is faster than writing them; else `unsupported`.
    public static let noFallback = WriteFlags(rawValue: 4)
    /// Others' view stays as it is: needs `write-unchanged` only.
    public static let unchanged = WriteFlags(rawValue: 8)
    /// Wait for overlapping writes, and keep new ones waiting.
    public static let serialising = WriteFlags(rawValue: 16)
    /// Stored compressed: whole clusters, or the image's last part. Only where the driver says that it
    /// ``BlockDriver/supportsCompressedWrites``; zeroes ignore it.
    public static let compressed = WriteFlags(rawValue: 32)
}

/// What is known of a run of bytes: one of those that a ``BlockStatusList`` holds.
public struct BlockStatus: Sendable {
    /// Where a run of bytes is stored below.
    public struct Mapping: Sendable {
        /// The node that stores them.
        public var node: BlockNode
        public var offset: Int
        @inlinable
        public init(node: BlockNode, offset: Int) {
            self.node = node
            self.offset = offset
        }
    }

    public var flags: ExtentFlags
    /// The length of the run, at least 1 and at most what was asked about.
    public var count: Int
    public var mapping: Mapping?
    /// Of a whole chain: 0 where the top layer has it, 1 where its backing image has it…; `nil` when no
    /// layer has it: zeroes. Of one node always 0.
    public var depth: Int?

    @inlinable
    public init(
        _ flags: ExtentFlags, count: Int, mapping: Mapping? = nil, depth: Int? = 0
    ) {
        self.flags = flags
        self.count = count
        self.mapping = mapping
        self.depth = depth
    }
}

/// How space is reserved when an image is made or grown.
public enum Preallocation: String, Sendable, CaseIterable {
    case off, metadata, falloc, full
}

/// The alignment and the sizes that a driver can take. All are powers of two but the maxima.
public struct NodeLimits: Sendable, Equatable {
    /// Offsets and lengths of reads and writes are multiples of this; dispatch sees to it.
    public var requestAlignment = 1
    /// The alignment of memory that the driver needs; 1 for any.
    public var memoryAlignment = 1
    /// The largest read or write; dispatch cuts longer ones.
    public var transferMax = Limits.requestBytesMax
    /// Zeroing and discarding work on multiples of this; 0 for no preference. An allocation unit.
    public var allocationUnit = 0

    public init() {}
}

/// What `query-named-block-nodes` and image info tell of a node's format.
public struct NodeInformation: Sendable {
    /// The cluster size; 0 where there are none.
    public var clusterSize = 0
    public var isDirty = false
    public var isCorrupt = false
    /// The data is encrypted.
    public var isEncrypted = false
    /// The backing image's name as the image has it; `nil` where it names none.
    public var backingName: String?
    /// The backing image's format, where the image tells.
    public var backingFormat: String?
    /// Driver-specific facts, as the `format-specific` member of image info.
    public var formatSpecific: JSONValue?

    public init() {}
}
