import BlockCore

// The server's side of fixed newstyle negotiation (proto.md, "Fixed newstyle negotiation").
//
//     greeting ─▶ client flags ─▶ option ◀──┐
//                                  │  │ └───┘ reply
//                  GO, EXPORT_NAME │  │ STARTTLS
//                                  ▼  ▼
//                       transmission  the caller does TLS, then tlsEstablished() ─▶ option
//
// Invariants
// 1. At most one option is answered per `advance`, so the caller's send queue bounds memory.
// 2. An option is understood only when all its declared data is there, and it must be used up
//    exactly: more or less is an error reply, and the next option is read from where it begins.
// 3. Nothing agreed or received in plaintext is left after STARTTLS.

/// Whether a server's clients have to use TLS (proto.md, "Server-side requirements").
public enum NBDTLSMode: Sendable, CaseIterable {
    /// NOTLS: there is none.
    case none
    /// FORCEDTLS: every option but STARTTLS and ABORT is refused until TLS is established.
    case required
}

/// The server's handshake as a state machine without I/O.
///
/// Send ``greeting``; then give every received byte to ``receive(_:)`` and call
/// ``advance(catalogue:)`` until it asks for bytes.
public struct NBDHandshake: Sendable {
    /// What the caller does next.
    public enum Action: Equatable, Sendable {
        /// Receive more, then come back.
        case receive
        /// Send these bytes, then come back.
        case send([UInt8])
        /// Send these bytes, establish TLS, then call ``tlsEstablished()``.
        case startTLS(send: [UInt8])
        /// Send these bytes; then requests follow, ``takeRemainder()`` first.
        case transmit(send: [UInt8], NBDSession)
        /// Send these bytes, as far as that goes, and close the connection. `reason` is `nil` when
        /// the client asked for it.
        case close(send: [UInt8], reason: String?)
    }

    private enum State: Sendable {
        case clientFlags
        case option
        /// The rest of a refused option's data is read and dropped.
        case swallow(Int)
        case startingTLS
        case finished
    }

    private let tlsMode: NBDTLSMode
    private var state = State.clientFlags
    private var input: [UInt8] = []
    private var inputStart = 0
    private var optionCount = 0
    private var isFixedNewstyle = false
    private var sendsZeroes = true
    private(set) var isEncrypted = false
    var mode = NBDReplyMode.simple
    /// What the last `NBD_OPT_SET_META_CONTEXT` selected, and of which export.
    var selection: (exportName: String, contexts: [NBDContext])?

    public init(tls: NBDTLSMode = .none) {
        tlsMode = tls
    }

    /// The server's first 18 bytes.
    public static let greeting: [UInt8] = {
        var writer = NBDWriter()
        writer.append(NBDMagic.greeting)
        writer.append(NBDMagic.option)
        writer.append(NBDHandshakeFlags([.fixedNewstyle, .noZeroes]).rawValue)
        return writer.bytes
    }()

    /// Takes bytes that came from the client. Call ``advance(catalogue:)`` between, or input piles up.
    public mutating func receive(_ bytes: UnsafeRawBufferPointer) {
        if inputStart > 0 {
            input.removeFirst(inputStart)
            inputStart = 0
        }
        input.append(contentsOf: bytes)
    }

    /// The bytes that came after the option that ended the handshake.
    public mutating func takeRemainder() -> [UInt8] {
        defer {
            input = []
            inputStart = 0
        }
        return Array(input[inputStart...])
    }

    /// TLS is there; the handshake goes on inside it, with nothing agreed yet.
    public mutating func tlsEstablished() {
        guard case .startingTLS = state else { preconditionFailure("TLS was not asked for") }
        isEncrypted = true
        state = .option
    }

    /// Takes one step.
    ///
    /// - Parameter catalogue: the exports as they are now.
    public mutating func advance(catalogue: some NBDExportCatalogue) -> Action {
        while true {
            switch state {
            case .clientFlags:
                guard available >= 4 else { return .receive }
                if let reason = takeClientFlags() { return close(reason) }
            case .swallow(let left):
                let count = min(left, available)
                inputStart += count
                guard count == left else {
                    state = .swallow(left - count)
                    return .receive
                }
                state = .option
            case .option:
                return takeOption(catalogue)
            case .startingTLS:
                return .receive
            case .finished:
                return .close(send: [], reason: nil)
            }
        }
    }

    // MARK: Input

    private var available: Int { input.count - inputStart }

    private func peek<T: FixedWidthInteger>(at offset: Int, as type: T.Type = T.self) -> T {
        input.withUnsafeBytes { $0.bigEndian(at: inputStart + offset, as: T.self) }
    }

    /// Reads the client's flags (proto.md, "Client flags"); the reason to close, if there is one.
    private mutating func takeClientFlags() -> String? {
        let flags = peek(at: 0, as: UInt32.self)
        inputStart += 4
        let known = NBDHandshakeFlags([.fixedNewstyle, .noZeroes])
        guard flags & ~UInt32(known.rawValue) == 0 else {
            return "the client set unknown handshake flags 0x\(String(flags, radix: 16))"
        }
        let client = NBDHandshakeFlags(rawValue: UInt16(truncatingIfNeeded: flags))
        isFixedNewstyle = client.contains(.fixedNewstyle)
        sendsZeroes = !client.contains(.noZeroes)
        state = .option
        return nil
    }

    /// Reads one option (proto.md, "Option haggling"): magic, type, length, data.
    private mutating func takeOption(_ catalogue: some NBDExportCatalogue) -> Action {
        guard available >= 16 else { return .receive }
        guard peek(at: 0, as: UInt64.self) == NBDMagic.option else {
            return close("an option does not begin with its magic number")
        }
        let type = peek(at: 8, as: UInt32.self)
        let count = Int(peek(at: 12, as: UInt32.self))
        let option = NBDOption(rawValue: type)
        if let reason = refusal(of: option, count: count) { return close(reason) }
        guard count <= NBDLimits.optionBytesMax else {
            countOption(16, swallow: count)
            let isBlocked = tlsMode == .required && !isEncrypted && option != .startTLS
            return reply(to: type, isBlocked ? .tlsRequired : .tooBig)
        }
        guard available >= 16 + count else { return .receive }
        let data = input[(inputStart + 16)..<(inputStart + 16 + count)]
        countOption(16 + count)
        if tlsMode == .required, !isEncrypted, option != .startTLS, option != .abort {
            return reply(to: type, .tlsRequired, "this server needs TLS")
        }
        guard let option else { return reply(to: type, .unsupported) }
        return answer(option, data, catalogue)
    }

    private mutating func countOption(_ taken: Int, swallow: Int = 0) {
        inputStart += taken
        optionCount += 1
        if swallow > 0 { state = .swallow(swallow) }
    }

    /// Why an option ends the connection before its data is read, if it does.
    private func refusal(of option: NBDOption?, count: Int) -> String? {
        guard optionCount < NBDLimits.optionCountMax else {
            return "the client sent more than \(NBDLimits.optionCountMax) options"
        }
        guard count <= NBDLimits.optionSwallowBytesMax else {
            return "the client announced an option of \(count) bytes"
        }
        // EXPORT_NAME has no error reply: closing is the only answer.
        guard option != .exportName else {
            if count > NBDLimits.stringBytesMax { return "the export's name is too long" }
            if tlsMode == .required, !isEncrypted { return "the client did not start TLS" }
            if mode == .extended { return "EXPORT_NAME does not go with extended headers" }
            return nil
        }
        return isFixedNewstyle ? nil : "a client without fixed newstyle can only name an export"
    }

    // MARK: Answers

    private mutating func answer(
        _ option: NBDOption, _ data: ArraySlice<UInt8>, _ catalogue: some NBDExportCatalogue
    ) -> Action {
        switch option {
        case .exportName: return answerExportName(data, catalogue)
        case .abort:
            state = .finished
            var writer = NBDWriter()
            writer.appendReply(to: option.rawValue, .acknowledge)
            return .close(send: writer.bytes, reason: nil)
        case .list: return answerList(data, catalogue)
        case .startTLS: return answerStartTLS(data)
        case .info, .go: return answerInfo(option, data, catalogue)
        case .structuredReply, .extendedHeaders: return answerMode(option, data)
        case .listMetaContext, .setMetaContext:
            return answerMetaContext(option, data, catalogue)
        }
    }

    /// proto.md, `NBD_OPT_EXPORT_NAME`: the name is all the data; size, flags, 124 zeroes.
    private mutating func answerExportName(
        _ data: ArraySlice<UInt8>, _ catalogue: some NBDExportCatalogue
    ) -> Action {
        guard let name = name(data), let export = catalogue.export(named: name) else {
            return close("the client named an export that does not exist")
        }
        let session = session(for: export, alignment: 1)
        var writer = NBDWriter()
        writer.append(UInt64(export.size))
        writer.append(session.flags.rawValue)
        if sendsZeroes { writer.append(zeroes: 124) }
        state = .finished
        return .transmit(send: writer.bytes, session)
    }

    /// proto.md, `NBD_OPT_LIST`: one `NBD_REP_SERVER` an export, with its name and description.
    private func answerList(
        _ data: ArraySlice<UInt8>, _ catalogue: some NBDExportCatalogue
    ) -> Action {
        guard data.isEmpty else { return invalid(.list, "LIST takes no data") }
        var writer = NBDWriter()
        for export in catalogue.exports.prefix(NBDLimits.optionReplyCountMax) {
            let name = export.name.cut(toBytes: NBDLimits.stringBytesMax)
            let description = export.description.cut(toBytes: NBDLimits.stringBytesMax)
            writer.appendReply(
                to: NBDOption.list.rawValue, .server,
                count: 4 + name.utf8.count + description.utf8.count)
            writer.append(UInt32(name.utf8.count))
            writer.append(name)
            writer.append(description)
        }
        writer.appendReply(to: NBDOption.list.rawValue, .acknowledge)
        return .send(writer.bytes)
    }

    /// proto.md, `NBD_OPT_STARTTLS`. Bytes that a client sent behind it in plaintext could pass for
    /// bytes that came through TLS, so they end the connection.
    private mutating func answerStartTLS(_ data: ArraySlice<UInt8>) -> Action {
        guard data.isEmpty else { return invalid(.startTLS, "STARTTLS takes no data") }
        guard !isEncrypted else { return invalid(.startTLS, "TLS is in use already") }
        guard tlsMode == .required else {
            return reply(to: NBDOption.startTLS.rawValue, .policy, "this server has no TLS")
        }
        guard available == 0 else {
            return close("the client sent plaintext behind STARTTLS")
        }
        mode = .simple
        selection = nil
        state = .startingTLS
        var writer = NBDWriter()
        writer.appendReply(to: NBDOption.startTLS.rawValue, .acknowledge)
        return .startTLS(send: writer.bytes)
    }

    /// proto.md, `NBD_OPT_STRUCTURED_REPLY` and `NBD_OPT_EXTENDED_HEADERS`.
    private mutating func answerMode(_ option: NBDOption, _ data: ArraySlice<UInt8>) -> Action {
        guard data.isEmpty else { return invalid(option, "this option takes no data") }
        let wanted: NBDReplyMode = option == .extendedHeaders ? .extended : .structured
        guard mode < wanted else {
            if mode == .extended, wanted == .structured {
                return reply(
                    to: option.rawValue, .extendedHeaderRequired,
                    "extended headers are agreed on already")
            }
            return invalid(option, "this is agreed on already")
        }
        mode = wanted
        return reply(to: option.rawValue, .acknowledge)
    }

    /// proto.md, `NBD_OPT_INFO` and `NBD_OPT_GO`: 32-bit name length, name, 16-bit count, 16-bit
    /// information types.
    private mutating func answerInfo(
        _ option: NBDOption, _ data: ArraySlice<UInt8>, _ catalogue: some NBDExportCatalogue
    ) -> Action {
        var reader = NBDReader(data)
        guard let nameCount: UInt32 = reader.integer() else {
            return invalid(option, "the data is too short")
        }
        guard nameCount <= NBDLimits.stringBytesMax else {
            return reply(to: option.rawValue, .tooBig, "the export's name is too long")
        }
        guard let nameBytes = reader.bytes(nameCount), let typeCount: UInt16 = reader.integer()
        else { return invalid(option, "the data is too short") }
        var types: Set<NBDInfoType> = []
        for _ in 0..<typeCount {
            guard let type: UInt16 = reader.integer() else {
                return invalid(option, "the data is too short")
            }
            // Unknown types are ignored, as the protocol asks.
            if let type = NBDInfoType(rawValue: type) { types.insert(type) }
        }
        guard reader.isAtEnd else { return invalid(option, "the data is too long") }
        guard let name = name(nameBytes) else {
            return invalid(option, "the export's name is not UTF-8")
        }
        guard let export = catalogue.export(named: name) else {
            return reply(to: option.rawValue, .unknown, "export '\(name)' does not exist")
        }
        let knowsBlockSize = types.contains(.blockSize)
        let minimum = export.blockSizes.minimum
        if option == .info, !knowsBlockSize, minimum > 1 {
            return reply(
                to: option.rawValue, .blockSizeRequired,
                "this export needs its block size asked for")
        }
        let session = session(for: export, alignment: knowsBlockSize ? Int(minimum) : 1)
        var writer = NBDWriter()
        appendInfo(option, types, session, to: &writer)
        writer.appendReply(to: option.rawValue, .acknowledge)
        guard option == .go else { return .send(writer.bytes) }
        state = .finished
        return .transmit(send: writer.bytes, session)
    }

    private func appendInfo(
        _ option: NBDOption, _ types: Set<NBDInfoType>, _ session: NBDSession,
        to writer: inout NBDWriter
    ) {
        let export = session.export
        if types.contains(.name) {
            appendInfo(option, .name, export.name, to: &writer)
        }
        if types.contains(.description), !export.description.isEmpty {
            appendInfo(option, .description, export.description, to: &writer)
        }
        // A client that does not promise alignment is told that it need not align: smaller requests
        // than the minimum are served by reading, changing and writing back.
        let sizes = export.blockSizes
        writer.appendReply(to: option.rawValue, .info, count: 14)
        writer.append(NBDInfoType.blockSize.rawValue)
        writer.append(types.contains(.blockSize) ? sizes.minimum : 1)
        writer.append(sizes.preferred)
        writer.append(sizes.maximum)
        writer.appendReply(to: option.rawValue, .info, count: 12)
        writer.append(NBDInfoType.export.rawValue)
        writer.append(UInt64(export.size))
        writer.append(session.flags.rawValue)
    }

    private func appendInfo(
        _ option: NBDOption, _ type: NBDInfoType, _ text: String, to writer: inout NBDWriter
    ) {
        let text = text.cut(toBytes: NBDLimits.stringBytesMax)
        writer.appendReply(to: option.rawValue, .info, count: 2 + text.utf8.count)
        writer.append(type.rawValue)
        writer.append(text)
    }

    // MARK: Shared

    /// A name as text, or `nil` when it is none: not UTF-8, or with a zero byte inside.
    func name(_ bytes: ArraySlice<UInt8>) -> String? {
        guard !bytes.contains(0) else { return nil }
        return String(validating: bytes, as: UTF8.self)
    }

    private func session(for export: NBDExportInfo, alignment: Int) -> NBDSession {
        var identifiers: [UInt32] = []
        if mode >= .structured, let selection,
            selection.exportName.utf8.elementsEqual(export.name.utf8)
        {
            for (index, context) in export.contexts.enumerated()
            where selection.contexts.contains(context) {
                identifiers.append(UInt32(index))
            }
        }
        return NBDSession(
            export: export, mode: mode, contextIDs: identifiers, alignment: alignment)
    }

    func reply(to option: UInt32, _ type: NBDOptionReply, _ text: String = "") -> Action {
        var writer = NBDWriter()
        writer.appendReply(to: option, type, text: text)
        return .send(writer.bytes)
    }

    func invalid(_ option: NBDOption, _ text: String) -> Action {
        reply(to: option.rawValue, .invalid, text)
    }

    private mutating func close(_ reason: String) -> Action {
        state = .finished
        return .close(send: [], reason: reason)
    }
}
