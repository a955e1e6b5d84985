// The numbers of the NBD protocol, named as its document (doc/proto.md of the NBD project) names them.

/// Magic numbers of the wire (proto.md, "Newstyle negotiation", "Request message", "Reply message").
public enum NBDMagic {
    /// `NBDMAGIC`: the first eight bytes of a server.
    public static let greeting: UInt64 = 0x4e42_444d_4147_4943
    /// `IHAVEOPT`: the second eight bytes of a newstyle server, and the start of every option.
    public static let option: UInt64 = 0x4948_4156_454f_5054
    /// The start of every option reply.
    public static let optionReply: UInt64 = 0x0003_e889_0455_65a9
    /// `NBD_REQUEST_MAGIC`.
    public static let request: UInt32 = 0x2560_9513
    /// `NBD_EXTENDED_REQUEST_MAGIC`.
    public static let extendedRequest: UInt32 = 0x21e4_1c71
    /// `NBD_SIMPLE_REPLY_MAGIC`.
    public static let simpleReply: UInt32 = 0x6744_6698
    /// `NBD_STRUCTURED_REPLY_MAGIC`.
    public static let structuredReply: UInt32 = 0x668e_33ef
    /// `NBD_EXTENDED_REPLY_MAGIC`.
    public static let extendedReply: UInt32 = 0x6e8a_278c
}

/// Bounds on what a peer may send, in bytes unless the name says otherwise.
public enum NBDLimits {
    /// A name, description, query or error message: proto.md allows 4096 bytes.
    public static let stringBytesMax = 4_096
    /// An option's data that is kept and understood. Longer options are refused with
    /// `NBD_REP_ERR_TOO_BIG`.
    public static let optionBytesMax = 128 << 10
    /// An option's data that is read and thrown away to keep the framing. A client that announces
    /// more is disconnected.
    public static let optionSwallowBytesMax = 32 << 20
    /// Options in one handshake.
    public static let optionCountMax = 2_048
    /// Replies to one option, such as the exports of a list.
    public static let optionReplyCountMax = 65_536
    /// The data of one read or write, and what is announced as the maximum block size.
    public static let payloadBytesMax = 32 << 20
    /// A write's data that is read and thrown away to keep the framing, with `NBD_EINVAL` as the
    /// reply. A client that announces more is disconnected.
    public static let payloadSwallowBytesMax = 64 << 20
    /// Extents in one block status reply.
    public static let statusExtentCountMax = 131_072
    /// Metadata contexts of one export, and so also of one connection.
    public static let contextCountMax = 1_024
}

/// What the server can do in the handshake (proto.md, "Handshake flags").
public struct NBDHandshakeFlags: OptionSet, Hashable, Sendable {
    public let rawValue: UInt16
    public init(rawValue: UInt16) { self.rawValue = rawValue }

    public static let fixedNewstyle = NBDHandshakeFlags(rawValue: 1)
    public static let noZeroes = NBDHandshakeFlags(rawValue: 2)
}

/// Option types (proto.md, "Option types").
public enum NBDOption: UInt32, Sendable, CaseIterable {
    case exportName = 1
    case abort = 2
    case list = 3
    case startTLS = 5
    case info = 6
    case go = 7
    case structuredReply = 8
    case listMetaContext = 9
    case setMetaContext = 10
    case extendedHeaders = 11
}

/// Option reply types (proto.md, "Option reply types").
public enum NBDOptionReply: UInt32, Sendable, CaseIterable {
    case acknowledge = 1
    case server = 2
    case info = 3
    case metaContext = 4
    case unsupported = 0x8000_0001
    case policy = 0x8000_0002
    case invalid = 0x8000_0003
    case platform = 0x8000_0004
    case tlsRequired = 0x8000_0005
    case unknown = 0x8000_0006
    case shutdown = 0x8000_0007
    case blockSizeRequired = 0x8000_0008
    case tooBig = 0x8000_0009
    case extendedHeaderRequired = 0x8000_000a
}

/// Information types of `NBD_OPT_INFO` and `NBD_OPT_GO` (proto.md, "NBD_OPT_GO").
public enum NBDInfoType: UInt16, Sendable, CaseIterable {
    case export = 0
    case name = 1
    case description = 2
    case blockSize = 3
}

/// What an export can do (proto.md, "Transmission flags").
public struct NBDTransmissionFlags: OptionSet, Hashable, Sendable {
    public let rawValue: UInt16
    @inlinable public init(rawValue: UInt16) { self.rawValue = rawValue }

    public static let hasFlags = NBDTransmissionFlags(rawValue: 1 << 0)
    public static let readOnly = NBDTransmissionFlags(rawValue: 1 << 1)
    public static let sendFlush = NBDTransmissionFlags(rawValue: 1 << 2)
    public static let sendFUA = NBDTransmissionFlags(rawValue: 1 << 3)
    public static let rotational = NBDTransmissionFlags(rawValue: 1 << 4)
    public static let sendTrim = NBDTransmissionFlags(rawValue: 1 << 5)
    public static let sendWriteZeroes = NBDTransmissionFlags(rawValue: 1 << 6)
    public static let sendDF = NBDTransmissionFlags(rawValue: 1 << 7)
    public static let canMultiConn = NBDTransmissionFlags(rawValue: 1 << 8)
    public static let sendResize = NBDTransmissionFlags(rawValue: 1 << 9)
    public static let sendCache = NBDTransmissionFlags(rawValue: 1 << 10)
    public static let sendFastZero = NBDTransmissionFlags(rawValue: 1 << 11)
    public static let blockStatusPayload = NBDTransmissionFlags(rawValue: 1 << 12)
}

/// Request types (proto.md, "Request types").
public enum NBDCommand: UInt16, Sendable, CaseIterable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case cache = 5
    case writeZeroes = 6
    case blockStatus = 7
}

/// Flags of a request (proto.md, "Command flags").
public struct NBDCommandFlags: OptionSet, Hashable, Sendable {
    public let rawValue: UInt16
    @inlinable public init(rawValue: UInt16) { self.rawValue = rawValue }

    public static let fua = NBDCommandFlags(rawValue: 1 << 0)
    public static let noHole = NBDCommandFlags(rawValue: 1 << 1)
    public static let dontFragment = NBDCommandFlags(rawValue: 1 << 2)
    public static let requestOne = NBDCommandFlags(rawValue: 1 << 3)
    public static let fastZero = NBDCommandFlags(rawValue: 1 << 4)
    public static let payloadLength = NBDCommandFlags(rawValue: 1 << 5)
}

/// Types of structured and extended reply chunks (proto.md, "Structured reply types").
public enum NBDChunkType: UInt16, Sendable, CaseIterable {
    case none = 0
    case offsetData = 1
    case offsetHole = 2
    case blockStatus = 5
    case blockStatusExtended = 6
    case error = 0x8001
    case errorOffset = 0x8002
}

/// Flags of a reply chunk (proto.md, "Structured reply flags").
public struct NBDChunkFlags: OptionSet, Hashable, Sendable {
    public let rawValue: UInt16
    @inlinable public init(rawValue: UInt16) { self.rawValue = rawValue }

    /// The last chunk of its reply.
    public static let done = NBDChunkFlags(rawValue: 1)
}

/// How replies look on a connection, as its handshake agreed.
public enum NBDReplyMode: UInt8, Sendable, CaseIterable, Comparable {
    /// 28-byte requests, simple replies.
    case simple
    /// 28-byte requests, structured replies.
    case structured
    /// 32-byte requests, 64-bit lengths, extended replies.
    case extended

    @inlinable
    public static func < (left: NBDReplyMode, right: NBDReplyMode) -> Bool {
        left.rawValue < right.rawValue
    }
}

/// What `base:allocation` says of an extent (proto.md, "NBD_META_CONTEXT base:allocation").
public struct NBDAllocationFlags: OptionSet, Hashable, Sendable {
    public let rawValue: UInt32
    @inlinable public init(rawValue: UInt32) { self.rawValue = rawValue }

    /// `NBD_STATE_HOLE`: not allocated; writing may fail for want of space.
    public static let hole = NBDAllocationFlags(rawValue: 1)
    /// `NBD_STATE_ZERO`: reads as zeroes.
    public static let zero = NBDAllocationFlags(rawValue: 2)
}
