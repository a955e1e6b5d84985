import BlockCore

/// Decides what becomes of each request of one session (proto.md, "Transmission phase").
///
/// Invariants
/// 1. Payload that follows a header is received or swallowed before the next header is read, whatever
///    is wrong with the request; a payload too large for that ends the connection.
/// 2. What is executed lies within ``size``.
public struct NBDRequestRules: Sendable {
    public let mode: NBDReplyMode
    public let flags: NBDTransmissionFlags
    /// The export's size in bytes; may grow while it is exported.
    public var size: Int
    /// What the client promised to align its requests to.
    public let alignment: Int
    /// Contexts that block status answers for when a request does not choose.
    public let contextIDs: [UInt32]

    public init(_ session: NBDSession) {
        mode = session.mode
        flags = session.flags
        size = session.export.size
        alignment = session.alignment
        contextIDs = session.contextIDs
    }

    /// What to do with the request whose header is in `bytes`.
    ///
    /// - Parameter bytes: at least ``NBDRequestHeader/count(in:)`` bytes; fewer trap.
    public func judge(_ bytes: UnsafeRawBufferPointer) -> NBDDisposition {
        guard let header = NBDRequestHeader(parsing: bytes, mode: mode) else {
            return .drop(reason: "a request does not begin with its magic number")
        }
        return judge(header)
    }

    /// What to do with a request.
    public func judge(_ header: NBDRequestHeader) -> NBDDisposition {
        let command = NBDCommand(rawValue: header.type)
        if command == .disconnect { return .disconnect }
        guard let payload = payloadCount(header, command) else {
            return .drop(reason: "the client announced \(header.length) bytes of payload")
        }
        let range = ByteRange(checking: header.offset, count: header.length)
        var request = NBDRequest(
            command: command ?? .flush, flags: header.flags, cookie: header.cookie,
            range: range ?? ByteRange(0, 0), headerOffset: header.offset)
        guard let command else {
            let refusal = NBDRefusal(.invalid, .unknownCommand(header.type), length: header.length)
            return .refuse(request, refusal, swallow: payload)
        }
        let carriesStatusPayload =
            command == .blockStatus && mode == .extended && header.flags.contains(.payloadLength)
        if carriesStatusPayload {
            guard let start = ByteRange(checking: header.offset, count: 0) else {
                let refusal = NBDRefusal(
                    .invalid, .pastEnd(exportSize: size), length: header.length)
                return .refuse(request, refusal, swallow: payload)
            }
            request.range = start
            return judgeStatusPayload(request, payload)
        }
        if let refusal = refusal(of: request, command, header.length, isSound: range != nil) {
            return .refuse(request, refusal, swallow: payload)
        }
        request.payloadCount = payload
        // A flush covers everything; what its range says has no meaning.
        if command == .flush { request.range = ByteRange(0, 0) }
        return .execute(request)
    }

    /// Bytes that follow the header; `nil` when there are too many to swallow.
    @inline(__always)
    private func payloadCount(_ header: NBDRequestHeader, _ command: NBDCommand?) -> Int? {
        // A writer that forgets the payload flag of extended headers still sends its payload.
        let carriesPayload =
            command == .write || (mode == .extended && header.flags.contains(.payloadLength))
        guard carriesPayload else { return 0 }
        guard header.length <= UInt64(NBDLimits.payloadSwallowBytesMax) else { return nil }
        return Int(header.length)
    }

    /// What is wrong with a request, if anything is.
    private func refusal(
        of request: NBDRequest, _ command: NBDCommand, _ length: UInt64, isSound: Bool
    ) -> NBDRefusal? {
        func refuse(_ reason: NBDRefusal.Reason, _ error: NBDErrorCode = .invalid) -> NBDRefusal {
            NBDRefusal(error, reason, length: length)
        }
        guard isOffered(command) else { return refuse(.notOffered) }
        guard request.flags.isSubset(of: allowedFlags(command)) else { return refuse(.flags) }
        if flags.contains(.readOnly),
            command == .write || command == .trim || command == .writeZeroes
        {
            return refuse(.readOnly, .notPermitted)
        }
        if command == .flush { return nil }
        let writes = command == .write || command == .writeZeroes
        guard isSound, request.range.end <= size else {
            return refuse(.pastEnd(exportSize: size), writes ? .noSpace : .invalid)
        }
        if command == .read || command == .write, length > UInt64(NBDLimits.payloadBytesMax) {
            return refuse(
                .tooLong, request.flags.contains(.dontFragment) ? .overflow : .invalid)
        }
        // The tail of an export that is not a whole number of blocks may be named up to its end.
        guard request.range.offset.isAligned(to: alignment),
            request.range.end.isAligned(to: alignment) || request.range.end == size
        else { return refuse(.unaligned(blockSize: alignment)) }
        guard command == .blockStatus else { return nil }
        if contextIDs.isEmpty { return refuse(.noContext) }
        if request.range.isEmpty { return refuse(.empty) }
        return nil
    }

    /// Whether the client was told of the command.
    @inline(__always)
    private func isOffered(_ command: NBDCommand) -> Bool {
        switch command {
        case .read, .write, .disconnect: true
        case .flush: flags.contains(.sendFlush)
        // A read-only export offers no change at all: the reply to one is about that.
        case .trim: flags.contains(.sendTrim) || flags.contains(.readOnly)
        case .writeZeroes: flags.contains(.sendWriteZeroes) || flags.contains(.readOnly)
        case .cache: flags.contains(.sendCache)
        case .blockStatus: mode >= .structured
        }
    }

    @inline(__always)
    private func allowedFlags(_ command: NBDCommand) -> NBDCommandFlags {
        // FUA is legal, without meaning, where nothing is written.
        var allowed: NBDCommandFlags = flags.contains(.sendFUA) ? .fua : []
        switch command {
        case .read: if flags.contains(.sendDF) { allowed.insert(.dontFragment) }
        case .write: if mode == .extended { allowed.insert(.payloadLength) }
        case .writeZeroes:
            allowed.insert(.noHole)
            if flags.contains(.sendFastZero) { allowed.insert(.fastZero) }
        case .blockStatus: allowed.insert(.requestOne)
        case .disconnect, .flush, .trim, .cache: break
        }
        return allowed
    }

    // MARK: Block status with a payload

    /// Bytes before the ids: the 64-bit length that the status is about.
    private static let statusPayloadPrefix = 8

    private func judgeStatusPayload(_ request: NBDRequest, _ payload: Int) -> NBDDisposition {
        let idBytes = payload - NBDRequestRules.statusPayloadPrefix
        let allowed: NBDCommandFlags = allowedFlags(.blockStatus).union(.payloadLength)
        guard flags.contains(.blockStatusPayload), request.flags.isSubset(of: allowed),
            !contextIDs.isEmpty, idBytes >= 4, idBytes % 4 == 0, idBytes / 4 <= contextIDs.count
        else {
            let refusal = NBDRefusal(.invalid, .payload, length: UInt64(payload))
            return .refuse(request, refusal, swallow: payload)
        }
        var request = request
        request.payloadCount = payload
        return .execute(request)
    }

    /// Understands the payload of a block status (proto.md, `NBD_CMD_BLOCK_STATUS`): a 64-bit length,
    /// then the 32-bit ids of the contexts that are asked for.
    ///
    /// - Returns: the request with its range, and the ids to answer for; or the error to reply with.
    public func status(
        _ request: NBDRequest, payload: UnsafeRawBufferPointer
    ) -> Result<(request: NBDRequest, contextIDs: [UInt32]), NBDStatusRefusal> {
        let invalid = NBDStatusRefusal(error: .invalid)
        let prefix = NBDRequestRules.statusPayloadPrefix
        guard payload.count >= prefix + 4, (payload.count - prefix) % 4 == 0 else {
            return .failure(invalid)
        }
        let length: UInt64 = payload.bigEndian(at: 0)
        guard let range = ByteRange(checking: request.range.offset, count: length),
            !range.isEmpty, range.end <= size, range.offset.isAligned(to: alignment),
            range.end.isAligned(to: alignment) || range.end == size
        else { return .failure(invalid) }
        var asked: Set<UInt32> = []
        for offset in stride(from: prefix, to: payload.count, by: 4) {
            let id: UInt32 = payload.bigEndian(at: offset)
            guard contextIDs.contains(id), asked.insert(id).inserted else {
                return .failure(invalid)
            }
        }
        var request = request
        request.range = range
        return .success((request, contextIDs.filter(asked.contains)))
    }
}

/// Why a block status cannot be answered.
public struct NBDStatusRefusal: Error, Hashable, Sendable {
    public let error: NBDErrorCode
}
