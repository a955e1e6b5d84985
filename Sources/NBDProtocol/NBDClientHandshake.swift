import BlockCore

/// What a server told of an export.
public struct NBDRemoteExport: Sendable, Equatable {
    public var name: String
    /// For people; empty where the server has none.
    public var description = ""
    /// What the server said beyond the name; `nil` where it tells names only.
    public var details: Details?
    /// Metadata contexts by name.
    public var contexts: [String] = []

    public struct Details: Sendable, Equatable {
        /// In bytes.
        public var size: UInt64
        /// With bits that this client does not know.
        public var flags: NBDTransmissionFlags
        /// Minimum, preferred, maximum; `nil` where the server does not say.
        public var blockSizes: BlockSizes?
    }

    public struct BlockSizes: Sendable, Equatable {
        public var minimum: UInt32
        public var preferred: UInt32
        public var maximum: UInt32
    }

    init(name: String) {
        self.name = name
    }
}

/// The client's side of the newstyle handshake, without its I/O (proto.md, "Newstyle negotiation").
///
/// ```
///   greeting ─▶ (STARTTLS) ─▶ STRUCTURED_REPLY ─┬▶ LIST ─▶ INFO, LIST_META_CONTEXT of each ─▶ ABORT
///                                               └▶ SET_META_CONTEXT ─▶ GO
/// ```
///
/// Received bytes go in with ``receive(_:)``; ``advance()`` says what to do, until it is done. One option
/// is under way at a time, and a server's replies are bounded in number and length.
public struct NBDClientHandshake: Sendable {
    public enum Goal: Sendable, Equatable {
        /// All that the server tells of its exports.
        case list
        /// To use an export, with these contexts for block status.
        case use(name: String, contexts: [String])
    }

    public enum Action: Sendable, Equatable {
        /// Receive more first.
        case receive
        case send([UInt8])
        /// Establish TLS, then call ``tlsEstablished()``.
        case startTLS
        /// The exports, after ``Goal/list``. Send the bytes: a goodbye.
        case listed([NBDRemoteExport], [UInt8])
        /// Requests may be sent, after ``Goal/use(name:contexts:)``.
        case connected(Session)
    }

    /// What the two sides agreed on.
    public struct Session: Sendable, Equatable {
        public var export: NBDRemoteExport
        public var mode: NBDReplyMode
        /// The ids of the contexts that were asked for and are there, by name.
        public var contextIDs: [String: UInt32]
    }

    private enum Step: Sendable, Equatable {
        case greeting
        case startTLS
        case waitingForTLS
        case structuredReply
        case list
        case info(Int)
        case contexts(Int)
        case setContexts
        case go
        case done
    }

    private let goal: Goal
    private let usesTLS: Bool
    private let takesChunks: Bool
    private var step = Step.greeting
    private var input: ArraySlice<UInt8> = []
    private var replyCount = 0
    private var mode = NBDReplyMode.simple
    private var exports: [NBDRemoteExport] = []
    private var contextIDs: [String: UInt32] = [:]
    /// The option of the step is on its way.
    private var isAsked = false
    /// Block sizes that came before the size.
    private var waitingSizes: NBDRemoteExport.BlockSizes?

    /// - Parameters:
    ///   - usesTLS: nothing but STARTTLS is asked for before TLS is established.
    ///   - takesChunks: structured replies are asked for; without them there is no block status.
    public init(_ goal: Goal, usesTLS: Bool = false, takesChunks: Bool = true) {
        self.goal = goal
        self.usesTLS = usesTLS
        self.takesChunks = takesChunks
        if case .use(let name, _) = goal { exports = [NBDRemoteExport(name: name)] }
    }

    public mutating func receive(_ bytes: UnsafeRawBufferPointer) {
        input += bytes
    }

    /// TLS is there: everything is said inside it from here on.
    public mutating func tlsEstablished() {
        precondition(step == .waitingForTLS)
        // What came before is the word of whoever is in between.
        input = []
        step = firstStep
        isAsked = false
    }

    /// - Throws: `protocolViolation` for what no server says, `unsupported` for servers that are too old,
    ///   `permissionDenied` and `notFound` for what the server refuses.
    public mutating func advance() throws(BlockError) -> Action {
        switch step {
        case .greeting: return try greet()
        case .waitingForTLS, .done: return .receive
        default: break
        }
        guard isAsked else { return ask() }
        while let reply = try nextReply() {
            if let action = try take(reply) { return action }
        }
        return .receive
    }

    private mutating func ask() -> Action {
        isAsked = true
        replyCount = 0
        return .send(option)
    }

    private mutating func go(to next: Step) -> Action {
        step = next
        switch next {
        case .waitingForTLS: return .startTLS
        case .done:
            if case .list = goal {
                return .listed(exports, Self.option(.abort, NBDWriter()))
            }
            return .connected(
                Session(export: exports[0], mode: mode, contextIDs: contextIDs))
        default: return ask()
        }
    }

    // MARK: Greeting

    private mutating func greet() throws(BlockError) -> Action {
        guard input.count >= 16 else { return .receive }
        var reader = NBDReader(input)
        guard reader.integer(UInt64.self) == NBDMagic.greeting else {
            throw BlockError(.protocolViolation, "the server does not greet as an NBD server does")
        }
        guard reader.integer(UInt64.self) == NBDMagic.option else {
            throw BlockError(
                .unsupported, "the server speaks the old protocol, without negotiation")
        }
        guard let flags = reader.integer(UInt16.self) else { return .receive }
        input = input.dropFirst(18)
        let known = NBDHandshakeFlags(rawValue: flags)
        guard known.contains(.fixedNewstyle) else {
            throw BlockError(
                .unsupported, "the server cannot negotiate: it is not of the fixed newstyle")
        }
        step = usesTLS ? .startTLS : firstStep
        isAsked = true
        var writer = NBDWriter()
        writer.append(
            UInt32(known.intersection([.fixedNewstyle, .noZeroes]).rawValue))
        return .send(writer.bytes + option)
    }

    // MARK: Options

    /// What asks for the current step.
    private var option: [UInt8] {
        switch step {
        case .startTLS: Self.option(.startTLS, NBDWriter())
        case .structuredReply: Self.option(.structuredReply, NBDWriter())
        case .list: Self.option(.list, NBDWriter())
        case .info(let index): Self.option(.info, information(exports[index].name))
        case .contexts(let index): Self.option(.listMetaContext, queries(exports[index].name, []))
        case .setContexts: Self.option(.setMetaContext, queries(exports[0].name, wantedContexts))
        case .go: Self.option(.go, information(exports[0].name))
        case .greeting, .waitingForTLS, .done: []
        }
    }

    private var wantedContexts: [String] {
        if case .use(_, let contexts) = goal { return contexts }
        return []
    }

    private static func option(_ option: NBDOption, _ data: NBDWriter) -> [UInt8] {
        var writer = NBDWriter()
        writer.append(NBDMagic.option)
        writer.append(option.rawValue)
        writer.append(UInt32(data.bytes.count))
        return writer.bytes + data.bytes
    }

    /// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`: a name, and the information that is wanted.
    private func information(_ name: String) -> NBDWriter {
        var writer = NBDWriter()
        writer.append(UInt32(name.utf8.count))
        writer.append(name)
        let types: [NBDInfoType] = [.name, .description, .blockSize]
        writer.append(UInt16(types.count))
        for type in types { writer.append(type.rawValue) }
        return writer
    }

    private func queries(_ name: String, _ contexts: [String]) -> NBDWriter {
        var writer = NBDWriter()
        writer.append(UInt32(name.utf8.count))
        writer.append(name)
        writer.append(UInt32(contexts.count))
        for context in contexts {
            writer.append(UInt32(context.utf8.count))
            writer.append(context)
        }
        return writer
    }

    // MARK: Replies

    private struct Reply {
        let type: UInt32
        let data: ArraySlice<UInt8>
        var known: NBDOptionReply? { NBDOptionReply(rawValue: type) }
        var isError: Bool { type & 0x8000_0000 != 0 }
        /// Errors carry a text for people.
        var text: String {
            data.isEmpty ? "" : ": " + String(decoding: data, as: UTF8.self).cut(toBytes: 512)
        }
    }

    private mutating func nextReply() throws(BlockError) -> Reply? {
        var reader = NBDReader(input)
        guard let magic = reader.integer(UInt64.self) else { return nil }
        guard magic == NBDMagic.optionReply else {
            throw BlockError(.protocolViolation, "the server's reply has a wrong magic number")
        }
        guard reader.integer(UInt32.self) != nil, let type = reader.integer(UInt32.self),
            let count = reader.integer(UInt32.self)
        else { return nil }
        guard count <= NBDLimits.optionBytesMax else {
            throw BlockError(.protocolViolation, "the server's reply has \(count) bytes")
        }
        guard let data = reader.bytes(count) else { return nil }
        input = input.dropFirst(20 + Int(count))
        replyCount += 1
        guard replyCount <= NBDLimits.optionReplyCountMax else {
            throw BlockError(.protocolViolation, "the server's replies to one option do not end")
        }
        return Reply(type: type, data: data)
    }

    /// - Returns: `nil` when more replies follow.
    private mutating func take(_ reply: Reply) throws(BlockError) -> Action? {
        if reply.isError { return try refused(reply) }
        switch (step, reply.known) {
        case (.startTLS, .acknowledge): return go(to: .waitingForTLS)
        case (.structuredReply, .acknowledge):
            mode = .structured
            return go(to: afterStructuredReply)
        case (.list, .server):
            try addExport(reply.data)
            return nil
        case (.list, .acknowledge): return go(to: exports.isEmpty ? .done : .info(0))
        case (.info(let index), .info):
            try takeInformation(reply.data, of: index)
            return nil
        case (.go, .info):
            try takeInformation(reply.data, of: 0)
            return nil
        case (.info(let index), .acknowledge):
            return go(to: mode == .simple ? afterExport(index) : .contexts(index))
        case (.contexts(let index), .metaContext):
            exports[index].contexts.append(try context(reply.data).name)
            return nil
        case (.contexts(let index), .acknowledge): return go(to: afterExport(index))
        case (.setContexts, .metaContext):
            let (identifier, name) = try context(reply.data)
            contextIDs[name] = identifier
            exports[0].contexts.append(name)
            return nil
        case (.setContexts, .acknowledge): return go(to: .go)
        case (.go, .acknowledge):
            guard exports[0].details != nil else {
                throw BlockError(.protocolViolation, "the server does not tell the export's size")
            }
            return go(to: .done)
        default:
            throw BlockError(
                .protocolViolation, "the server's reply has type \(reply.type), out of place")
        }
    }

    private var firstStep: Step { takesChunks ? .structuredReply : afterStructuredReply }

    private var afterStructuredReply: Step {
        if case .list = goal { return .list }
        return mode == .simple || wantedContexts.isEmpty ? .go : .setContexts
    }

    private func afterExport(_ index: Int) -> Step {
        index + 1 < exports.count ? .info(index + 1) : .done
    }

    private mutating func refused(_ reply: Reply) throws(BlockError) -> Action {
        switch (step, reply.known) {
        case (_, .tlsRequired):
            throw BlockError(
                .permissionDenied, "the server wants TLS\(reply.text)",
                remedy: "give it credentials with --tls-creds")
        // Old servers: names alone, without block status.
        case (.structuredReply, .unsupported): return go(to: afterStructuredReply)
        case (.info, .unsupported): return go(to: .done)
        case (.contexts(let index), .unsupported): return go(to: afterExport(index))
        case (.setContexts, .unsupported): return go(to: .go)
        // It went away since it was listed.
        case (.info(let index), .unknown): return go(to: afterExport(index))
        case (.startTLS, _):
            throw BlockError(.unsupported, "the server has no TLS\(reply.text)")
        case (.list, .policy), (.list, .unsupported):
            throw BlockError(
                .permissionDenied, "the server does not tell what it exports\(reply.text)")
        case (.go, .unknown), (.setContexts, .unknown):
            throw BlockError(
                .notFound, "the server has no export '\(exports[0].name)'\(reply.text)")
        default:
            throw BlockError(
                .permissionDenied, "the server refuses (error \(reply.type & 0xffff))\(reply.text)")
        }
    }

    private static let cutShort = BlockError(
        .protocolViolation, "the server's reply is cut short")

    /// `NBD_REP_SERVER`: a name, and details for people.
    private mutating func addExport(_ data: ArraySlice<UInt8>) throws(BlockError) {
        var reader = NBDReader(data)
        guard let count = reader.integer(UInt32.self), let name = reader.bytes(count),
            name.count <= NBDLimits.stringBytesMax
        else { throw Self.cutShort }
        exports.append(NBDRemoteExport(name: String(decoding: name, as: UTF8.self)))
    }

    /// `NBD_REP_INFO`.
    private mutating func takeInformation(
        _ data: ArraySlice<UInt8>, of index: Int
    ) throws(BlockError) {
        var reader = NBDReader(data)
        guard let type = reader.integer(UInt16.self) else { throw Self.cutShort }
        switch NBDInfoType(rawValue: type) {
        case .export:
            guard let size = reader.integer(UInt64.self), let flags = reader.integer(UInt16.self)
            else { throw Self.cutShort }
            let sizes = exports[index].details?.blockSizes ?? waitingSizes
            exports[index].details = .init(
                size: size, flags: NBDTransmissionFlags(rawValue: flags), blockSizes: sizes)
            waitingSizes = nil
        case .description:
            exports[index].description = String(decoding: data.dropFirst(2), as: UTF8.self)
        case .blockSize:
            guard let minimum = reader.integer(UInt32.self),
                let preferred = reader.integer(UInt32.self),
                let maximum = reader.integer(UInt32.self)
            else { throw Self.cutShort }
            let sizes = NBDRemoteExport.BlockSizes(
                minimum: minimum, preferred: preferred, maximum: maximum)
            if exports[index].details == nil { waitingSizes = sizes }
            exports[index].details?.blockSizes = sizes
        // The name as the server spells it, and what later versions may add.
        case .name, nil: return
        }
    }

    /// `NBD_REP_META_CONTEXT`.
    private func context(
        _ data: ArraySlice<UInt8>
    ) throws(BlockError) -> (identifier: UInt32, name: String) {
        var reader = NBDReader(data)
        guard let identifier = reader.integer(UInt32.self) else { throw Self.cutShort }
        guard data.count - 4 <= NBDLimits.stringBytesMax else {
            throw BlockError(.protocolViolation, "the name of a context is too long")
        }
        return (identifier, String(decoding: data.dropFirst(4), as: UTF8.self))
    }
}
