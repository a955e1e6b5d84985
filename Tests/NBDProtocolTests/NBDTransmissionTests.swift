import BlockCore
import BlockTesting
import Testing

@testable import NBDProtocol

@Suite struct NBDTransmissionTests {
    static let all: NBDTransmissionFlags = [
        .sendFlush, .sendFUA, .sendTrim, .sendWriteZeroes, .sendFastZero, .sendCache,
    ]

    func rules(
        _ mode: NBDReplyMode, _ flags: NBDTransmissionFlags = all, size: Int = 1 << 30,
        contexts: [UInt32] = [0], alignment: Int = 1
    ) -> NBDRequestRules {
        let export = NBDExportInfo(
            name: "disk", size: size, flags: flags, contexts: [.baseAllocation, .allocationDepth])
        return NBDRequestRules(
            NBDSession(export: export, mode: mode, contextIDs: contexts, alignment: alignment))
    }

    func header(
        _ command: NBDCommand, _ offset: UInt64, _ length: UInt64, _ flags: NBDCommandFlags = []
    ) -> NBDRequestHeader {
        NBDRequestHeader(
            flags: flags, type: command.rawValue, cookie: 0x0102_0304_0506_0708, offset: offset,
            length: length)
    }

    func error(_ disposition: NBDDisposition) -> NBDErrorCode? {
        refusal(disposition)?.error
    }

    func refusal(_ disposition: NBDDisposition) -> NBDRefusal? {
        if case .refuse(_, let refusal, _) = disposition { return refusal }
        return nil
    }

    func swallow(_ disposition: NBDDisposition) -> Int? {
        if case .refuse(_, _, let count) = disposition { return count }
        return nil
    }

    func executed(_ disposition: NBDDisposition) -> NBDRequest? {
        if case .execute(let request) = disposition { return request }
        return nil
    }

    // MARK: Requests

    @Test(arguments: NBDReplyMode.allCases)
    func headersAreParsedInBothSizes(mode: NBDReplyMode) throws {
        let magic = mode == .extended ? NBDMagic.extendedRequest : NBDMagic.request
        var bytes = ClientBytes.bigEndian(magic) + [0, 1, 0, 1] + [1, 2, 3, 4, 5, 6, 7, 8]
        bytes += ClientBytes.bigEndian(UInt64(4_096))
        bytes += mode == .extended ? ClientBytes.bigEndian(UInt64(512)) : [0, 0, 2, 0]
        #expect(bytes.count == NBDRequestHeader.count(in: mode))
        let parsed = bytes.withUnsafeBytes { NBDRequestHeader(parsing: $0, mode: mode) }
        #expect(parsed == header(.write, 4_096, 512, .fua))
        bytes[0] ^= 1
        let disposition = bytes.withUnsafeBytes { rules(mode).judge($0) }
        guard case .drop = disposition else {
            Issue.record("a wrong magic number must end the connection")
            return
        }
    }

    @Test(arguments: NBDReplyMode.allCases)
    func everyCommandWithinTheExportIsExecuted(mode: NBDReplyMode) {
        for command in NBDCommand.allCases where command != .disconnect {
            if command == .blockStatus, mode == .simple { continue }
            let count: UInt64 = command == .flush ? 0 : 4_096
            let request = executed(rules(mode).judge(header(command, 0, count)))
            #expect(request?.command == command)
            #expect(request?.payloadCount == (command == .write ? 4_096 : 0))
            #expect(request?.cookie == 0x0102_0304_0506_0708)
        }
        #expect(rules(mode).judge(header(.disconnect, 9, 9)) == .disconnect)
    }

    @Test func pastTheEndIsNoSpaceForWritesAndInvalidOtherwise() {
        let table: [(NBDCommand, NBDErrorCode)] = [
            (.read, .invalid), (.write, .noSpace), (.trim, .invalid), (.cache, .invalid),
            (.writeZeroes, .noSpace), (.blockStatus, .invalid),
        ]
        let ranges: [(UInt64, UInt64)] = [
            ((1 << 30) - 1, 2), (1 << 30, 1), (UInt64.max, 1), (UInt64.max - 1, 4_096),
            (1 << 63, 512), (UInt64(Int.max), 1),
        ]
        for (command, expected) in table {
            for (offset, length) in ranges {
                let disposition = rules(.structured).judge(header(command, offset, length))
                #expect(error(disposition) == expected, "\(command) \(offset)+\(length)")
                #expect(swallow(disposition) == (command == .write ? Int(length) : 0))
            }
            let last = rules(.structured).judge(header(command, (1 << 30) - 1, 1))
            #expect(executed(last) != nil, "\(command)")
        }
    }

    @Test func aReadOnlyExportRefusesEveryChange() {
        let rules = rules(.simple, [.readOnly, .sendFlush])
        for command in [NBDCommand.write, .trim, .writeZeroes] {
            #expect(error(rules.judge(header(command, 0, 512))) == .notPermitted)
        }
        #expect(swallow(rules.judge(header(.write, 0, 512))) == 512)
        #expect(executed(rules.judge(header(.read, 0, 512))) != nil)
    }

    @Test func whatWasNotOfferedIsInvalid() {
        let rules = rules(.simple, [])
        for command in [NBDCommand.flush, .trim, .writeZeroes, .cache, .blockStatus] {
            #expect(error(rules.judge(header(command, 0, 512))) == .invalid, "\(command)")
        }
        #expect(error(rules.judge(header(.write, 0, 512, .fua))) == .invalid)
        #expect(error(rules.judge(header(.read, 0, 512, .dontFragment))) == .invalid)
    }

    @Test func unknownCommandsAreInvalidAndKeepTheFraming() {
        for type in [UInt16(8), 9, 1_000, .max] {
            var request = header(.read, 0, 512)
            request.type = type
            #expect(error(rules(.simple).judge(request)) == .invalid)
            #expect(swallow(rules(.simple).judge(request)) == 0)
            request.flags = .payloadLength
            #expect(swallow(rules(.extended).judge(request)) == 512)
        }
    }

    @Test func refusalsTellWhatIsWrong() throws {
        let open = rules(.extended, contexts: [])
        let readOnly = rules(.extended, [.readOnly], alignment: 512)
        var unknown = header(.read, 0, 1)
        unknown.type = 77
        let table: [(NBDRequestRules, NBDRequestHeader, String)] = [
            (open, header(.read, 1 << 63, 512), "READ of 512 bytes at 9223372036854775808"),
            (open, header(.writeZeroes, 1 << 30, 1), "the export at 1073741824"),
            (open, header(.write, 0, 33 << 20, .payloadLength), "longer than 33554432"),
            (open, header(.blockStatus, 0, 1), "metadata context"),
            (open, header(.blockStatus, .max, 12, .payloadLength), "past the end"),
            (open, header(.blockStatus, 0, 12, .payloadLength), "payload of 12 bytes"),
            (open, header(.trim, 0, 1, .payloadLength), "TRIM with the flags 0x20"),
            (open, unknown, "command 77"),
            (rules(.extended), header(.blockStatus, 0, 0), "no bytes"),
            (readOnly, header(.trim, 0, 512), "read-only"),
            (readOnly, header(.flush, 0, 0), "FLUSH is not offered"),
            (readOnly, header(.read, 1, 512), "blocks of 512"),
        ]
        for (rules, header, part) in table {
            guard case .refuse(let request, let refusal, _) = rules.judge(header) else {
                Issue.record("not refused: \(part)")
                continue
            }
            let message = refusal.message(for: request)
            #expect(message.contains(part), "\(message)")
        }
    }

    static let payloads: [(UInt64, NBDErrorCode?)] = [
        (0, nil), (255, nil), (256, nil), (257, nil), (4_095, nil), (4_096, nil), (4_097, nil),
        ((32 << 20) - 1, nil), (32 << 20, nil), ((32 << 20) + 1, .invalid),
    ]

    @Test(arguments: payloads)
    func readsAndWritesEndAtThirtyTwoMebibytes(length: UInt64, expected: NBDErrorCode?) {
        for command in [NBDCommand.read, .write] {
            let disposition = rules(.structured).judge(header(command, 0, length))
            #expect(error(disposition) == expected)
            if expected != nil, command == .write { #expect(swallow(disposition) == Int(length)) }
        }
    }

    @Test func aPayloadTooLargeToSwallowEndsTheConnection() {
        for length in [UInt64(64 << 20) + 1, UInt64(UInt32.max)] {
            guard case .drop = rules(.simple).judge(header(.write, 0, length)) else {
                Issue.record("\(length) bytes were not refused")
                continue
            }
        }
        let huge = header(.read, 0, .max, .payloadLength)
        guard case .drop = rules(.extended).judge(huge) else {
            Issue.record("a huge payload was not refused")
            return
        }
    }

    @Test func aLargeUnfragmentedReadOverflows() {
        let disposition = rules(.structured).judge(header(.read, 0, 33 << 20, .dontFragment))
        #expect(error(disposition) == .overflow)
    }

    @Test func longZeroesAndTrimsAreExecutedWithExtendedHeaders() {
        let rules = rules(.extended, size: 1 << 40)
        for command in [NBDCommand.trim, .writeZeroes, .cache, .blockStatus] {
            #expect(executed(rules.judge(header(command, 0, 1 << 40)))?.range.count == 1 << 40)
        }
    }

    @Test func payloadFlagOnACommandWithoutPayloadIsInvalidAndSwallowed() {
        let flagged = header(.trim, 0, 512, .payloadLength)
        #expect(swallow(rules(.extended).judge(flagged)) == 512)
        #expect(error(rules(.extended).judge(flagged)) == .invalid)
        #expect(swallow(rules(.structured).judge(flagged)) == 0)
        #expect(error(rules(.structured).judge(flagged)) == .invalid)
    }

    @Test func requestsThatBreakThePromisedAlignmentAreInvalid() {
        let rules = rules(.structured, size: (1 << 20) + 100, alignment: 512)
        #expect(error(rules.judge(header(.read, 1, 512))) == .invalid)
        #expect(error(rules.judge(header(.read, 0, 511))) == .invalid)
        #expect(executed(rules.judge(header(.read, 512, 512))) != nil)
        #expect(executed(rules.judge(header(.read, 1 << 20, 100))) != nil)
    }

    @Test func blockStatusNeedsAContextAndAByte() {
        #expect(
            error(rules(.structured, contexts: []).judge(header(.blockStatus, 0, 1))) == .invalid)
        #expect(error(rules(.structured).judge(header(.blockStatus, 0, 0))) == .invalid)
        #expect(error(rules(.simple).judge(header(.blockStatus, 0, 1))) == .invalid)
    }

    @Test func blockStatusPayloadChoosesContexts() throws {
        let rules = rules(.extended, contexts: [0, 1])
        let request = try #require(
            executed(rules.judge(header(.blockStatus, 512, 12, [.payloadLength, .requestOne]))))
        #expect(request.payloadCount == 12)
        let payload = ClientBytes.bigEndian(UInt64(4_096)) + [0, 0, 0, 1]
        let result = try payload.withUnsafeBytes { try rules.status(request, payload: $0).get() }
        #expect(result.request.range == ByteRange(512, 4_096))
        #expect(result.contextIDs == [1])
    }

    @Test func brokenBlockStatusPayloadsAreInvalid() throws {
        let rules = rules(.extended, contexts: [0, 1])
        for length in [UInt64(0), 4, 8, 11, 13, 20] {
            let disposition = rules.judge(header(.blockStatus, 0, length, .payloadLength))
            #expect(error(disposition) == .invalid)
            #expect(swallow(disposition) == Int(length))
        }
        let request = try #require(
            executed(rules.judge(header(.blockStatus, 0, 16, .payloadLength))))
        let bad: [(UInt64, [UInt8])] = [
            (0, [0, 0, 0, 0, 0, 0, 0, 1]), (1 << 40, [0, 0, 0, 0, 0, 0, 0, 1]),
            (.max, [0, 0, 0, 0, 0, 0, 0, 1]), (1, [0, 0, 0, 2, 0, 0, 0, 1]),
            (1, [0, 0, 0, 1, 0, 0, 0, 1]),
        ]
        for (length, ids) in bad {
            let payload = ClientBytes.bigEndian(length) + ids
            let result = payload.withUnsafeBytes { rules.status(request, payload: $0) }
            #expect(throws: NBDStatusRefusal.self) { try result.get() }
        }
    }

    @Test func randomHeadersNeverTrap() {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededRandom(seed: seed)
        let edges: [UInt64] = [0, 1, 511, 1 << 30, UInt64(Int.max), UInt64(Int.max) + 1, .max]
        for _ in 0..<20_000 {
            let mode = NBDReplyMode(rawValue: UInt8(random.next() % 3)) ?? .simple
            let request = NBDRequestHeader(
                flags: NBDCommandFlags(rawValue: UInt16(truncatingIfNeeded: random.next() & 0x7f)),
                type: UInt16(random.next() % 10), cookie: random.next(),
                offset: edges.randomElement(using: &random) ?? 0,
                length: edges.randomElement(using: &random) ?? 0)
            if let executed = executed(rules(mode, alignment: 512).judge(request)) {
                #expect(executed.range.end <= 1 << 30, "seed \(seed)")
            }
        }
    }

    // MARK: Replies

    let read = NBDRequest(
        command: .read, flags: [], cookie: 0x0102_0304_0506_0708, range: ByteRange(512, 1_024))
    let cookie: [UInt8] = [1, 2, 3, 4, 5, 6, 7, 8]
    let at512: [UInt8] = [0, 0, 0, 0, 0, 0, 2, 0]

    func encoded(_ body: (UnsafeMutableRawBufferPointer) -> Int) -> [UInt8] {
        var memory = [UInt8](repeating: 0xaa, count: 256)
        let count = memory.withUnsafeMutableBytes(body)
        return Array(memory[..<count])
    }

    @Test func simpleReplyIsSixteenBytes() {
        let bytes = encoded { NBDReply.simple(.noSpace, cookie: read.cookie, to: $0) }
        #expect(bytes == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28] + cookie)
    }

    @Test func structuredReadHeaderCarriesTheOffset() {
        let bytes = encoded { NBDReply.readHeader(read, mode: .structured, to: $0) }
        #expect(
            bytes == [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1] + cookie + [0, 0, 4, 8] + at512)
    }

    @Test func extendedReadHeaderCarriesRequestOffsetAndWideLength() {
        let bytes = encoded { NBDReply.readHeader(read, mode: .extended, to: $0) }
        #expect(
            bytes == [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 1] + cookie + at512
                + [0, 0, 0, 0, 0, 0, 4, 8] + at512)
    }

    @Test func extendedRepliesCarryTheOffsetOfTheRequestWhateverItIs() throws {
        let table: [(NBDCommand, UInt64, UInt64)] = [
            (.read, 1 << 63, 512), (.write, .max, 2), (.flush, 4_096, 0), (.trim, 1 << 40, 1),
            (.blockStatus, .max - 1, 1), (.cache, 512, 512),
        ]
        for (command, offset, length) in table {
            let request: NBDRequest
            switch rules(.extended).judge(header(command, offset, length)) {
            case .execute(let executed): request = executed
            case .refuse(let refused, _, _): request = refused
            default: continue
            }
            let wanted = ClientBytes.bigEndian(offset)
            let success = encoded { NBDReply.success(request, mode: .extended, to: $0) }
            #expect(success[16..<24].elementsEqual(wanted), "\(command) \(offset)")
            let failure = encoded {
                NBDReply.failure(.invalid, replyingTo: request, mode: .extended, to: $0)
            }
            #expect(failure[16..<24].elementsEqual(wanted), "\(command) \(offset)")
        }
    }

    @Test func emptyReadsHaveNoDataChunk() {
        let empty = NBDRequest(command: .read, flags: [], cookie: 0, range: ByteRange(0, 0))
        let bytes = encoded { NBDReply.readHeader(empty, mode: .structured, to: $0) }
        #expect(bytes.count == 20 && bytes[4...7].elementsEqual([0, 1, 0, 0]))
    }

    @Test func holesAreThirtyTwoBytes() {
        let bytes = encoded {
            NBDReply.hole(ByteRange(512, 64), [], replyingTo: read, mode: .structured, to: $0)
        }
        #expect(bytes.count == 32)
        #expect(Array(bytes[4...7]) == [0, 0, 0, 2])
        #expect(Array(bytes[16...]) == [0, 0, 0, 12] + at512 + [0, 0, 0, 64])
    }

    @Test(arguments: NBDReplyMode.allCases)
    func failuresNameTheErrorAndCutTheMessage(mode: NBDReplyMode) {
        let bytes = encoded {
            NBDReply.failure(.inputOutput, "défaut", replyingTo: read, mode: mode, to: $0)
        }
        let start = NBDReply.chunkCount(mode)
        switch mode {
        case .simple: #expect(bytes.count == 16 && bytes[7] == 5)
        default:
            #expect(Array(bytes[start..<(start + 6)]) == [0, 0, 0, 5, 0, 7])
            #expect(Array(bytes[(start + 6)...]) == Array("défaut".utf8))
        }
        let long = encoded {
            NBDReply.failure(
                .invalid, String(repeating: "é", count: 9_000), replyingTo: read, mode: mode,
                to: $0)
        }
        #expect(long.count <= 256)
        if mode != .simple {
            #expect(String(validating: long[(start + 6)...], as: UTF8.self) != nil)
        }
    }

    @Test func failureAtAnOffsetEndsWithIt() {
        let bytes = encoded {
            NBDReply.failure(
                .inputOutput, "x", at: 512, replyingTo: read, mode: .structured, to: $0)
        }
        #expect(Array(bytes[4...7]) == [0, 1, 0x80, 2])
        #expect(Array(bytes.suffix(8)) == at512)
    }

    @Test func statusRepliesHaveNarrowAndWideExtents() {
        let extents = [NBDStatusExtent(count: 512, flags: 0), NBDStatusExtent(count: 64, flags: 3)]
        let narrow = encoded {
            NBDReply.status(
                extents, contextID: 7, .done, replyingTo: read, mode: .structured, to: $0)
        }
        #expect(narrow.count == NBDReply.statusCount(2, mode: .structured))
        #expect(Array(narrow[16...23]) == [0, 0, 0, 20, 0, 0, 0, 7])
        #expect(Array(narrow[24...]) == [0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 3])
        let wide = encoded {
            NBDReply.status(extents, contextID: 7, [], replyingTo: read, mode: .extended, to: $0)
        }
        #expect(wide.count == NBDReply.statusCount(2, mode: .extended))
        #expect(Array(wide[6...7]) == [0, 6])
        #expect(Array(wide[32...39]) == [0, 0, 0, 7, 0, 0, 0, 2])
        #expect(wide[24...31].elementsEqual([0, 0, 0, 0, 0, 0, 0, 40]))
    }

    @Test func anExtentBeyondFourGibibytesEndsANarrowStatus() {
        let extents = [
            NBDStatusExtent(count: 5 << 30, flags: 3), NBDStatusExtent(count: 1, flags: 0),
        ]
        let bytes = encoded {
            NBDReply.status(
                extents, contextID: 0, .done, replyingTo: read, mode: .structured, to: $0)
        }
        #expect(bytes.count == NBDReply.statusCount(1, mode: .structured))
        #expect(Array(bytes[24...27]) == [0xff, 0xff, 0, 0])
    }

    @Test func onlyTheProtocolsErrorsGoOut() {
        let plain = NBDRequest(command: .trim, flags: [], cookie: 0, range: ByteRange(0, 1))
        var fast = plain
        fast.flags = .fastZero
        for code in BlockError.Code.allCases {
            #expect(NBDErrorCode(BlockError(code, "x"), replyingTo: plain) != .none)
        }
        #expect(NBDErrorCode(BlockError(.noSpace, "x"), replyingTo: plain) == .noSpace)
        #expect(NBDErrorCode(BlockError(.readOnly, "x"), replyingTo: plain) == .notPermitted)
        #expect(NBDErrorCode(BlockError(.unsupported, "x"), replyingTo: plain) == .invalid)
        #expect(NBDErrorCode(BlockError(.unsupported, "x"), replyingTo: fast) == .notSupported)
    }

    @Test func blockSizesAreAlwaysLegal() {
        for minimum in [-1, 0, 1, 3, 512, 4_096, 65_536, 1 << 20, Int.max] {
            for preferred in [-1, 0, 1, 4_096, 65_537, Int.max] {
                for maximum in [-1, 0, 1, 512, 1 << 20, 32 << 20, Int.max] {
                    let sizes = NBDBlockSizes(
                        minimum: minimum, preferred: preferred, maximum: maximum)
                    #expect(sizes.minimum.isPowerOfTwo && sizes.minimum <= 65_536)
                    #expect(sizes.preferred.isPowerOfTwo && sizes.preferred >= 512)
                    #expect(sizes.preferred >= sizes.minimum && sizes.maximum >= sizes.preferred)
                    #expect(sizes.maximum <= 32 << 20 && sizes.maximum % sizes.minimum == 0)
                }
            }
        }
    }
}
