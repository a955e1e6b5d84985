import BlockCore
import Testing

@testable import BlockCrypto

@Suite struct LUKSHeaderTests {
    /// Fast enough for tests: the fewest iterations.
    static func make() throws -> (header: LUKSHeader, masterKey: SecretBytes) {
        try LUKSHeader.make(
            LUKSCreationOptions(
                try CipherSpecification(.aes256, .xts, .plain64), iterationMilliseconds: 1))
    }

    static func parse(_ bytes: [UInt8], isDetached: Bool = false) throws -> LUKSHeader {
        try bytes.withUnsafeBytes { try LUKSHeader(parsing: $0, isDetached: isDetached) }
    }

    @Test func aHeaderReadsBackAsItWasWritten() throws {
        var (header, key) = try Self.make()
        _ = try header.setSlot(
            3, SecretBytes(Array("word".utf8)), key, iterationMilliseconds: 1)
        #expect(try Self.parse(header.serialised()) == header)
        #expect(header.payloadOffset == 2_068_480)
    }

    @Test func eachPassphraseOpensItsSlotAlone() throws {
        var (header, key) = try Self.make()
        let words = ["first", "second"].map { SecretBytes(Array($0.utf8)) }
        var materials: [[UInt8]] = []
        for (number, word) in words.enumerated() {
            materials.append(
                try header.setSlot(number, word, key, iterationMilliseconds: 1))
        }
        for (number, material) in materials.enumerated() {
            for (other, word) in words.enumerated() {
                let found = try header.masterKey(inSlot: number, word, material: material)
                #expect((found != nil) == (number == other))
                #expect(found?.isEqual(to: key) ?? true)
            }
        }
    }

    @Test func anErasedSlotOpensToNobody() throws {
        var (header, key) = try Self.make()
        let word = SecretBytes(Array("word".utf8))
        let material = try header.setSlot(0, word, key, iterationMilliseconds: 1)
        header.eraseSlot(0)
        #expect(try header.masterKey(inSlot: 0, word, material: material) == nil)
    }

    @Test func aHeaderThatAsksForTooMuchWorkIsNotTried() throws {
        var (header, key) = try Self.make()
        let word = SecretBytes(Array("word".utf8))
        for number in 0..<3 { _ = try header.setSlot(number, word, key, iterationMilliseconds: 1) }
        try header.checkUnlockRounds()
        // As much as one slot may ask for, in the one that is tried last.
        var bytes = header.serialised()
        bytes.replaceSubrange(308..<312, with: [0x10, 0, 0, 0])
        let hostile = try Self.parse(bytes)
        #expect(hostile.unlockRounds > LUKS.Limit.unlockRoundsMax)
        #expect {
            try hostile.checkUnlockRounds()
        } throws: {
            ($0 as? BlockError)?.code == .exhausted
        }
    }

    @Test func theDigestCountsForEachSlot() throws {
        var (header, key) = try Self.make()
        let word = SecretBytes(Array("word".utf8))
        _ = try header.setSlot(0, word, key, iterationMilliseconds: 1)
        var bytes = header.serialised()
        bytes.replaceSubrange(164..<168, with: [0x0f, 0xff, 0xff, 0xff])
        #expect(try Self.parse(bytes).unlockRounds > LUKS.Limit.unlockRoundsMax)
    }

    @Test func everyFieldAtItsExtremesIsTakenOrRefused() throws {
        let (header, _) = try Self.make()
        let good = header.serialised()
        for offset in stride(from: 0, to: LUKS.headerSize, by: 4) {
            for value in [
                [0, 0, 0, 0], [255, 255, 255, 255], [127, 255, 255, 255], [0, 0, 0, 1],
            ] as [[UInt8]] {
                var bytes = good
                bytes.replaceSubrange(offset..<(offset + 4), with: value)
                for isDetached in [false, true] {
                    guard let parsed = try? Self.parse(bytes, isDetached: isDetached) else {
                        continue
                    }
                    #expect(parsed.end <= LUKS.Limit.offsetMax + 64 * 4000)
                    #expect(isDetached || parsed.end <= parsed.payloadOffset)
                }
            }
        }
    }

    @Test(
        arguments: [
            (104, [0, 0, 0, 1], "payload"), (164, [255, 255, 255, 255], "iterations"),
            (208, [1, 2, 3, 4], "state"), (248, [0, 0, 0, 0], "header"),
            (252, [0, 0, 0, 1], "stripes"), (296, [0, 0, 0, 8], "overlap"),
            (108, [0, 0, 0, 33], "33 bytes"),
        ] as [(Int, [UInt8], String)])
    func damagedHeadersAreRefusedByName(offset: Int, value: [UInt8], name: String) throws {
        var (header, key) = try Self.make()
        _ = try header.setSlot(0, SecretBytes([1]), key, iterationMilliseconds: 1)
        var bytes = header.serialised()
        bytes.replaceSubrange(offset..<(offset + 4), with: value)
        do {
            _ = try Self.parse(bytes)
            Issue.record("taken")
        } catch let error as BlockError {
            #expect(error.message.contains(name), "\(error)")
        }
    }

    @Test func shortHeadersAreRefused() throws {
        let bytes = try Self.make().header.serialised()
        for count in [0, 5, 8, 591] {
            #expect(throws: BlockError.self) { try Self.parse(Array(bytes.prefix(count))) }
        }
    }
}

extension LUKSHeader {
    /// The master key, if `passphrase` opens slot `number`, in one go.
    fileprivate func masterKey(
        inSlot number: Int, _ passphrase: SecretBytes, material: [UInt8]
    ) throws -> SecretBytes? {
        guard slots[number].isActive else { return nil }
        func key(_ work: KeyDerivation) throws -> SecretBytes {
            while !work.isFinished { try work.advance(300) }
            return try work.key
        }
        let slotKey = try key(try self.slotKey(number, passphrase))
        let found = try candidate(inSlot: number, slotKey, material: material)
        return isMasterDigest(try key(try digest(of: found))) ? found : nil
    }
}
