import BlockCore
import BlockTesting
import Testing

@testable import NBDProtocol

@Suite struct NBDHandshakeTests {
    typealias Bytes = ClientBytes

    @Test func goLeadsToTransmissionWithSizeAndFlags() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.go, Bytes.info("disk", [0])))
        #expect(run.session?.export.name == "disk")
        #expect(run.session?.mode == .simple)
        let export = run.replies.first { $0.data.starts(with: [0, 0]) }
        #expect(export?.data.count == 12)
        #expect(Array(export?.data[2..<10] ?? []) == Bytes.bigEndian(UInt64(1 << 30)))
        #expect(run.lastReply == .acknowledge)
    }

    @Test(arguments: [(UInt32(3), 10), (UInt32(1), 134)])
    func exportNameRepliesWithZeroesUnlessAgreedOtherwise(flags: UInt32, count: Int) {
        var run = HandshakeRun()
        run.feed(Bytes.flags(flags) + Bytes.option(.exportName, Array("disk".utf8)))
        #expect(run.session != nil)
        #expect(run.sent.count == count)
    }

    @Test func exportNameOfNothingCloses() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.exportName, Array("other".utf8)))
        #expect(run.isClosed && run.sent.isEmpty && run.session == nil)
    }

    @Test func unknownHandshakeFlagsClose() {
        var run = HandshakeRun()
        run.feed(Bytes.flags(7))
        #expect(run.isClosed)
    }

    @Test func aClientWithoutFixedNewstyleMayOnlyNameAnExport() {
        for option in NBDOption.allCases where option != .exportName {
            var run = HandshakeRun()
            run.feed(Bytes.flags(0) + Bytes.option(option, Bytes.data(for: option)))
            #expect(run.isClosed && run.sent.isEmpty, "\(option)")
        }
    }

    @Test func abortIsAcknowledgedThenCloses() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.abort))
        #expect(run.lastReply == .acknowledge)
        #expect(run.closedReason == .some(nil))
    }

    @Test func listNamesEveryExport() {
        var catalogue = NBDFixedCatalogue.disk
        catalogue.exports.append(NBDExportInfo(name: "b", size: 0, flags: []))
        var run = HandshakeRun(catalogue)
        run.feed(Bytes.flags() + Bytes.option(.list))
        #expect(run.replies.map(\.type) == [2, 2, 1])
        #expect(run.replies[0].data == [0, 0, 0, 4] + Array("diska disk".utf8))
    }

    @Test func unknownOptionIsUnsupportedAndFramingStays() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(99, [1, 2, 3]) + Bytes.option(.list))
        #expect(run.replies.map(\.type) == [NBDOptionReply.unsupported.rawValue, 2, 1])
    }

    @Test func goOfAnUnknownExportIsRefusedAndNegotiationGoesOn() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.go, Bytes.info("nope")))
        #expect(run.lastReply == .unknown && !run.isClosed)
        run.feed(Bytes.option(.go, Bytes.info("disk")))
        #expect(run.session != nil)
    }

    @Test func infoWithoutBlockSizeIsRefusedWhereAlignmentMatters() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.info, Bytes.info("disk")))
        #expect(run.lastReply == .blockSizeRequired)
        run.feed(Bytes.option(.info, Bytes.info("disk", [3])))
        #expect(run.lastReply == .acknowledge)
        #expect(run.session == nil)
    }

    @Test func aClientThatDoesNotAskForBlockSizesIsToldOne() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.go, Bytes.info("disk")))
        let sizes = run.replies.first { $0.data.starts(with: [0, 3]) }
        #expect(Array(sizes?.data[2..<6] ?? []) == [0, 0, 0, 1])
        #expect(run.session?.alignment == 1)
    }

    @Test func everyInformationTypeIsGivenWhenAskedFor() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.go, Bytes.info("disk", [3, 2, 1, 0, 77])))
        let types = Set(run.replies.filter { $0.type == 3 }.map { $0.data[1] })
        #expect(types == [0, 1, 2, 3])
        #expect(run.session?.alignment == 512)
    }

    @Test func repliesAreAgreedOnOnce() {
        var run = HandshakeRun()
        run.feed(
            Bytes.flags() + Bytes.option(.structuredReply) + Bytes.option(.structuredReply)
                + Bytes.option(.extendedHeaders) + Bytes.option(.extendedHeaders)
                + Bytes.option(.structuredReply))
        #expect(
            run.replies.map { NBDOptionReply(rawValue: $0.type) } == [
                .acknowledge, .invalid, .acknowledge, .invalid, .extendedHeaderRequired,
            ])
    }

    @Test func exportNameAfterExtendedHeadersCloses() {
        var run = HandshakeRun()
        run.feed(
            Bytes.flags() + Bytes.option(.extendedHeaders)
                + Bytes.option(.exportName, Array("disk".utf8)))
        #expect(run.isClosed && run.session == nil)
    }

    // MARK: Metadata contexts

    @Test func contextsNeedStructuredReplies() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.setMetaContext, Bytes.contexts("disk", ["base:"])))
        #expect(run.lastReply == .invalid)
    }

    static let lists: [([String], Int)] = [
        ([], 4), (["base:"], 1), (["qemu:"], 3), (["qemu:dirty-bitmap:"], 2),
        (["base:allocation", "qemu:allocation-depth"], 2), (["qemu:dirty-bitmap:two"], 1),
        (["x:"], 0), (["base"], 0), (["qemu:dirty"], 0), (["qemu:", "qemu:dirty-bitmap:"], 3),
    ]

    @Test(arguments: lists)
    func listMetaContextFollowsWildcards(queries: [String], count: Int) {
        var run = HandshakeRun()
        run.feed(
            Bytes.flags() + Bytes.option(.structuredReply)
                + Bytes.option(.listMetaContext, Bytes.contexts("disk", queries)))
        #expect(run.replies.filter { $0.type == 4 }.count == count)
        #expect(run.lastReply == .acknowledge)
    }

    @Test func setMetaContextSelectsExactNamesOnly() {
        var run = HandshakeRun()
        let queries = ["base:", "qemu:", "qemu:dirty-bitmap:two", "base:allocation", "other:x"]
        run.feed(
            Bytes.flags() + Bytes.option(.structuredReply)
                + Bytes.option(.setMetaContext, Bytes.contexts("disk", queries))
                + Bytes.option(.go, Bytes.info("disk")))
        #expect(run.session?.contextIDs == [0, 3])
        #expect(run.session?.context(3) == .dirtyBitmap("two"))
        #expect(run.session?.context(1) == nil)
    }

    @Test func aFailedSelectionForgetsTheOneBefore() {
        var run = HandshakeRun()
        run.feed(
            Bytes.flags() + Bytes.option(.structuredReply)
                + Bytes.option(.setMetaContext, Bytes.contexts("disk", ["base:allocation"]))
                + Bytes.option(.setMetaContext, [0])
                + Bytes.option(.go, Bytes.info("disk")))
        #expect(run.session?.contextIDs == [])
    }

    @Test func aSelectionOfAnotherExportDoesNotCount() {
        var catalogue = NBDFixedCatalogue.disk
        catalogue.exports.append(NBDExportInfo(name: "b", size: 0, flags: []))
        var run = HandshakeRun(catalogue)
        run.feed(
            Bytes.flags() + Bytes.option(.structuredReply)
                + Bytes.option(.setMetaContext, Bytes.contexts("b", ["base:allocation"]))
                + Bytes.option(.go, Bytes.info("disk")))
        #expect(run.session?.contextIDs == [])
    }

    // MARK: TLS

    @Test func beforeTLSEveryOptionNeedsTLS() {
        for option in NBDOption.allCases where ![.startTLS, .abort, .exportName].contains(option) {
            var run = HandshakeRun(tls: .required)
            run.feed(Bytes.flags() + Bytes.option(option, Bytes.data(for: option)))
            #expect(run.lastReply == .tlsRequired, "\(option)")
            #expect(run.session == nil)
        }
        var run = HandshakeRun(tls: .required)
        run.feed(Bytes.flags() + Bytes.option(200, [1]))
        #expect(run.lastReply == .tlsRequired)
    }

    @Test func exportNameWithoutTLSCloses() {
        var run = HandshakeRun(tls: .required)
        run.feed(Bytes.flags() + Bytes.option(.exportName, Array("disk".utf8)))
        #expect(run.isClosed && run.session == nil)
    }

    @Test func startTLSWithoutTLSIsRefusedByPolicy() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.startTLS))
        #expect(run.lastReply == .policy && !run.wantsTLS)
    }

    @Test func plaintextBehindStartTLSCloses() {
        for extra in [[UInt8](repeating: 0, count: 1), Bytes.option(.list)] {
            var run = HandshakeRun(tls: .required)
            run.feed(Bytes.flags() + Bytes.option(.startTLS) + extra)
            #expect(run.isClosed && !run.wantsTLS && run.sent.isEmpty)
        }
    }

    @Test func afterTLSTheHandshakeGoesOn() {
        var run = HandshakeRun(tls: .required)
        run.feed(Bytes.flags() + Bytes.option(.startTLS))
        #expect(run.wantsTLS)
        run.handshake.tlsEstablished()
        run.feed(Bytes.option(.startTLS) + Bytes.option(.go, Bytes.info("disk")))
        #expect(run.replies[1].type == NBDOptionReply.invalid.rawValue)
        #expect(run.session?.mode == .simple)
    }

    // MARK: Lengths

    static let lengths = [
        0, 255, 256, 257, 4_095, 4_096, 4_097, (32 << 20) - 1, 32 << 20, (32 << 20) + 1,
        Int(UInt32.max),
    ]

    @Test func everyOptionOfEveryLengthIsAnsweredOrCloses() {
        for type in UInt32(0)...13 {
            for length in NBDHandshakeTests.lengths {
                var run = HandshakeRun()
                run.feed(Bytes.flags() + Bytes.option(type, [], announcing: length))
                let swallowed = length <= NBDLimits.optionSwallowBytesMax ? length : 0
                let chunk = [UInt8](repeating: 0x62, count: 1 << 20)
                var left = swallowed
                while left > 0, !run.isClosed, run.session == nil {
                    run.feed(Array(chunk.prefix(min(left, chunk.count))))
                    left -= min(left, chunk.count)
                }
                if run.isClosed { continue }
                #expect(run.session == nil)
                // Whatever the answer was, the next option is read from where it begins.
                run.feed(Bytes.option(.abort))
                #expect(run.replies.count >= 2, "option \(type), \(length) bytes")
                #expect(run.closedReason == .some(nil), "option \(type), \(length) bytes")
            }
        }
    }

    @Test func namesUpToTheLimitAreFoundAndLongerOnesRefused() {
        for count in [255, 256, 257, 4_095, 4_096, 4_097] {
            let name = String(repeating: "n", count: count)
            var run = HandshakeRun(
                NBDFixedCatalogue([NBDExportInfo(name: name, size: 1, flags: [])]))
            run.feed(Bytes.flags() + Bytes.option(.go, Bytes.info(name)))
            #expect((run.session != nil) == (count <= 4_096))
            if count > 4_096 { #expect(run.lastReply == .tooBig) }
        }
    }

    @Test func aDeclaredLengthThatIsWrongByUpToEightIsAnErrorReply() {
        for option in NBDOption.allCases {
            let data = ClientBytes.data(for: option)
            for change in -8...8 where change != 0 && data.count + change >= 0 {
                var bytes = Array(data.prefix(data.count + change))
                while bytes.count < data.count + change { bytes.append(0x61) }
                var run = HandshakeRun()
                run.feed(Bytes.flags())
                if [.setMetaContext, .listMetaContext].contains(option) {
                    run.feed(Bytes.option(.structuredReply))
                }
                run.feed(Bytes.option(option, bytes))
                switch option {
                case .exportName, .abort: #expect(run.isClosed)
                default:
                    #expect(run.lastReply == .invalid, "\(option) \(change)")
                    run.feed(Bytes.option(.abort))
                    #expect(run.lastReply == .acknowledge)
                }
            }
        }
    }

    @Test func namesThatAreNotTextAreInvalid() {
        for bad: [UInt8] in [[0xff], [0x61, 0], [0xc0, 0x80]] {
            var run = HandshakeRun()
            let data = Bytes.bigEndian(UInt32(bad.count)) + bad + [0, 0]
            run.feed(Bytes.flags() + Bytes.option(.go, data))
            #expect(run.lastReply == .invalid)
        }
    }

    @Test func tooManyOptionsClose() {
        var run = HandshakeRun()
        run.feed(Bytes.flags())
        for _ in 0..<NBDLimits.optionCountMax { run.feed(Bytes.option(99)) }
        #expect(!run.isClosed)
        run.feed(Bytes.option(99))
        #expect(run.isClosed)
    }

    // MARK: Any bytes

    static let conversation: [UInt8] =
        Bytes.flags() + Bytes.option(.structuredReply) + Bytes.option(.list)
        + Bytes.option(.setMetaContext, Bytes.contexts("disk", ["base:allocation"]))
        + Bytes.option(.info, Bytes.info("disk", [3])) + Bytes.option(.go, Bytes.info("disk", [3]))

    @Test func bytesSplitAnywhereGiveTheSameAnswers() {
        let conversation = NBDHandshakeTests.conversation
        var whole = HandshakeRun()
        whole.feed(conversation)
        #expect(whole.session != nil)
        for split in 0...conversation.count {
            var run = HandshakeRun()
            run.feed(Array(conversation[..<split]))
            if split < conversation.count { #expect(run.session == nil && !run.isClosed) }
            run.feed(Array(conversation[split...]))
            #expect(run.sent == whole.sent && run.session == whole.session, "split at \(split)")
        }
    }

    @Test func everyPrefixFollowedByGarbageNeverTransmits() {
        let conversation = NBDHandshakeTests.conversation
        var random = SeededRandom(seed: 11)
        // The last two bytes are an information type, where anything is legal.
        for split in 0..<(conversation.count - 2) {
            var run = HandshakeRun()
            run.feed(Array(conversation[..<split]))
            // Announced lengths may make the server wait: it only must not trap or transmit.
            run.feed((0..<64).map { _ in UInt8(truncatingIfNeeded: random.next()) })
            #expect(run.session == nil, "split at \(split)")
        }
    }

    @Test func garbageInPlaceOfAnyByteNeverTraps() {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededRandom(seed: seed)
        for _ in 0..<3_000 {
            var bytes = NBDHandshakeTests.conversation
            for _ in 0..<(1 + random.next() % 4) {
                bytes[Int(random.next() % UInt64(bytes.count))] =
                    UInt8(truncatingIfNeeded: random.next())
            }
            var run = HandshakeRun(tls: random.next() % 4 == 0 ? .required : .none)
            run.feed(bytes)
            #expect(run.session == nil || run.session?.export.name == "disk", "seed \(seed)")
        }
    }

    @Test func bytesBehindGoAreKeptForTheRequests() {
        var run = HandshakeRun()
        run.feed(Bytes.flags() + Bytes.option(.go, Bytes.info("disk")) + [1, 2, 3])
        #expect(run.handshake.takeRemainder() == [1, 2, 3])
    }
}
