import BlockCore

/// The header of a request as it came (proto.md, "Request message", "Extended request message").
///
///     compact    0 magic   4 flags   6 type   8 cookie   16 offset   24 length (32 bits)
///     extended   0 magic   4 flags   6 type   8 cookie   16 offset   24 length (64 bits)
public struct NBDRequestHeader: Hashable, Sendable {
    /// Bytes of a header in the simple and structured modes.
    public static let compactCount = 28
    /// Bytes of a header with extended headers.
    public static let extendedCount = 32

    public var flags: NBDCommandFlags
    public var type: UInt16
    /// The client's own; replies carry it back.
    public var cookie: UInt64
    public var offset: UInt64
    /// Bytes of the range, or of the payload where the payload flag says so.
    public var length: UInt64

    @inlinable
    public init(
        flags: NBDCommandFlags, type: UInt16, cookie: UInt64, offset: UInt64, length: UInt64
    ) {
        self.flags = flags
        self.type = type
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// Bytes of a request's header.
    @inlinable @inline(__always)
    public static func count(in mode: NBDReplyMode) -> Int {
        mode == .extended ? extendedCount : compactCount
    }

    /// Reads a header.
    ///
    /// - Parameter bytes: at least ``count(in:)`` bytes; fewer trap.
    /// - Returns: `nil` when the magic number is wrong: the framing is lost, disconnect.
    @inlinable
    public init?(parsing bytes: UnsafeRawBufferPointer, mode: NBDReplyMode) {
        precondition(bytes.count >= NBDRequestHeader.count(in: mode))
        let magic = mode == .extended ? NBDMagic.extendedRequest : NBDMagic.request
        guard bytes.bigEndian(at: 0, as: UInt32.self) == magic else { return nil }
        flags = NBDCommandFlags(rawValue: bytes.bigEndian(at: 4))
        type = bytes.bigEndian(at: 6)
        cookie = bytes.bigEndian(at: 8)
        offset = bytes.bigEndian(at: 16)
        length =
            mode == .extended
            ? bytes.bigEndian(at: 24, as: UInt64.self)
            : UInt64(bytes.bigEndian(at: 24, as: UInt32.self))
    }
}

/// A request that may be executed: known command, legal flags, range within the export.
public struct NBDRequest: Hashable, Sendable {
    public var command: NBDCommand
    public var flags: NBDCommandFlags
    public var cookie: UInt64
    /// Where it acts. Empty for a flush, and for a block status whose payload is still to be read.
    public var range: ByteRange
    /// The offset as the header has it, whatever it means: extended replies carry it back.
    public var headerOffset: UInt64
    /// Bytes of payload that follow the header.
    public var payloadCount: Int

    /// - Parameter headerOffset: `nil` where it is that of the range.
    @inlinable
    public init(
        command: NBDCommand, flags: NBDCommandFlags, cookie: UInt64, range: ByteRange,
        headerOffset: UInt64? = nil, payloadCount: Int = 0
    ) {
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.range = range
        self.headerOffset = headerOffset ?? UInt64(range.offset)
        self.payloadCount = payloadCount
    }
}

/// What to do with a request.
public enum NBDDisposition: Hashable, Sendable {
    /// Receive ``NBDRequest/payloadCount`` bytes, execute, reply. A block status with a payload goes
    /// through ``NBDRequestRules/status(_:payload:)`` when the payload is there.
    case execute(NBDRequest)
    /// Receive and drop `swallow` bytes, and reply with the error. `request` is what replies need.
    case refuse(NBDRequest, NBDRefusal, swallow: Int)
    /// The client says goodbye: finish what is in flight, then close.
    case disconnect
    /// The framing is lost: close at once.
    case drop(reason: String)
}
