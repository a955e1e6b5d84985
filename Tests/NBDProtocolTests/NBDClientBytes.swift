import BlockCore

@testable import NBDProtocol

/// What a client sends in a handshake, as bytes.
enum ClientBytes {
    static func flags(_ flags: UInt32 = 3) -> [UInt8] {
        bigEndian(flags)
    }

    /// An option whose header may announce another length than its data has.
    static func option(_ type: UInt32, _ data: [UInt8] = [], announcing count: Int? = nil)
        -> [UInt8]
    {
        bigEndian(NBDMagic.option) + bigEndian(type) + bigEndian(UInt32(count ?? data.count)) + data
    }

    static func option(_ type: NBDOption, _ data: [UInt8] = []) -> [UInt8] {
        option(type.rawValue, data)
    }

    static func info(_ name: String, _ types: [UInt16] = []) -> [UInt8] {
        bigEndian(UInt32(name.utf8.count)) + Array(name.utf8) + bigEndian(UInt16(types.count))
            + types.flatMap { bigEndian($0) }
    }

    static func contexts(_ name: String, _ queries: [String]) -> [UInt8] {
        bigEndian(UInt32(name.utf8.count)) + Array(name.utf8) + bigEndian(UInt32(queries.count))
            + queries.flatMap { bigEndian(UInt32($0.utf8.count)) + Array($0.utf8) }
    }

    /// Well-formed data for every option, for exports named `disk`.
    static func data(for option: NBDOption) -> [UInt8] {
        switch option {
        case .exportName: Array("disk".utf8)
        case .abort, .list, .startTLS, .structuredReply, .extendedHeaders: []
        case .info, .go: info("disk", [0, 3])
        case .listMetaContext, .setMetaContext: contexts("disk", ["base:allocation"])
        }
    }

    static func bigEndian(_ value: some FixedWidthInteger) -> [UInt8] {
        withUnsafeBytes(of: value.bigEndian) { Array($0) }
    }
}

/// One reply to an option, taken apart.
struct OptionReply: Equatable {
    var option: UInt32
    var type: UInt32
    var data: [UInt8]

    static func parse(_ bytes: [UInt8]) -> [OptionReply] {
        var result: [OptionReply] = []
        var rest = bytes[...]
        while rest.count >= 20 {
            let (magic, option, type, count) = rest.withUnsafeBytes {
                (
                    $0.bigEndian(at: 0, as: UInt64.self), $0.bigEndian(at: 8, as: UInt32.self),
                    $0.bigEndian(at: 12, as: UInt32.self),
                    Int($0.bigEndian(at: 16, as: UInt32.self))
                )
            }
            guard magic == NBDMagic.optionReply, rest.count >= 20 + count else { break }
            result.append(
                OptionReply(
                    option: option, type: type, data: Array(rest.dropFirst(20).prefix(count))))
            rest = rest.dropFirst(20 + count)
        }
        return result
    }
}

/// A server's handshake driven to the end of its input.
struct HandshakeRun {
    var handshake: NBDHandshake
    var catalogue: NBDFixedCatalogue
    var sent: [UInt8] = []
    var session: NBDSession?
    var closedReason: String??
    var wantsTLS = false

    init(tls: NBDTLSMode = .none, _ catalogue: NBDFixedCatalogue = .disk) {
        handshake = NBDHandshake(tls: tls)
        self.catalogue = catalogue
    }

    var isClosed: Bool { closedReason != nil }
    var replies: [OptionReply] { OptionReply.parse(sent) }
    var lastReply: NBDOptionReply? { replies.last.flatMap { NBDOptionReply(rawValue: $0.type) } }

    mutating func feed(_ bytes: [UInt8]) {
        bytes.withUnsafeBytes { handshake.receive($0) }
        while true {
            switch handshake.advance(catalogue: catalogue) {
            case .receive: return
            case .send(let bytes): sent += bytes
            case .startTLS(let bytes):
                sent += bytes
                wantsTLS = true
                return
            case .transmit(let bytes, let session):
                sent += bytes
                self.session = session
                return
            case .close(let bytes, let reason):
                sent += bytes
                if closedReason == nil { closedReason = .some(reason) }
                return
            }
        }
    }
}

extension NBDFixedCatalogue {
    static let disk = NBDFixedCatalogue([
        NBDExportInfo(
            name: "disk", description: "a disk", size: 1 << 30,
            flags: [.sendFlush, .sendFUA, .sendTrim, .sendWriteZeroes, .sendFastZero, .sendCache],
            blockSizes: NBDBlockSizes(minimum: 512),
            contexts: [
                .baseAllocation, .allocationDepth, .dirtyBitmap("one"), .dirtyBitmap("two"),
            ])
    ])
}
