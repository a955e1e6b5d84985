import BlockCore
import Testing

@testable import NBDProtocol

/// The client's handshake against the server's, and against what no server says.
@Suite struct NBDClientHandshakeTests {
    /// Carries bytes between the two until the client is done; `piece` bytes at a time.
    private func run(
        _ goal: NBDClientHandshake.Goal, _ catalogue: NBDFixedCatalogue = .disk,
        tls: NBDTLSMode = .none, usesTLS: Bool = false, takesChunks: Bool = true,
        piece: Int = .max
    ) throws(BlockError) -> NBDClientHandshake.Action {
        var client = NBDClientHandshake(goal, usesTLS: usesTLS, takesChunks: takesChunks)
        var server = HandshakeRun(tls: tls, catalogue)
        var toClient = NBDHandshake.greeting[...]
        for _ in 0..<100_000 {
            switch try client.advance() {
            case .receive:
                guard !toClient.isEmpty else {
                    throw BlockError(.disconnected, "both wait")
                }
                let part = toClient.prefix(piece)
                toClient = toClient.dropFirst(piece)
                Array(part).withUnsafeBytes { client.receive($0) }
            case .send(let bytes):
                let before = server.sent.count
                server.feed(bytes)
                toClient += server.sent.dropFirst(before)
            case .startTLS:
                #expect(server.wantsTLS)
                server.handshake.tlsEstablished()
                client.tlsEstablished()
            case let done: return done
            }
        }
        throw BlockError(.timedOut, "no end")
    }

    @Test(arguments: [1, 7, Int.max])
    func listTellsOfEveryExportWithItsContexts(piece: Int) throws {
        var catalogue = NBDFixedCatalogue.disk
        catalogue.exports.append(
            NBDExportInfo(name: "zwei", size: 512, flags: [.readOnly], contexts: []))
        guard case .listed(let exports, let goodbye) = try run(.list, catalogue, piece: piece)
        else {
            Issue.record("not listed")
            return
        }
        #expect(exports.map(\.name) == ["disk", "zwei"])
        #expect(exports.first?.description == "a disk")
        #expect(exports.first?.details?.size == 1 << 30)
        #expect(exports.first?.details?.blockSizes?.minimum == 512)
        #expect(
            exports.first?.contexts == [
                "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one",
                "qemu:dirty-bitmap:two",
            ])
        #expect(exports.last?.details?.flags.contains(.readOnly) == true)
        #expect(goodbye == ClientBytes.option(.abort))
    }

    @Test func useAgreesOnContextsAndMode() throws {
        let goal = NBDClientHandshake.Goal.use(
            name: "disk", contexts: ["qemu:dirty-bitmap:two", "base:allocation", "other:x"])
        guard case .connected(let session) = try run(goal) else {
            Issue.record("not connected")
            return
        }
        #expect(session.mode == .structured)
        #expect(session.contextIDs == ["base:allocation": 0, "qemu:dirty-bitmap:two": 3])
        #expect(session.export.details?.size == 1 << 30)
        let plain = NBDClientHandshake.Goal.use(name: "disk", contexts: [])
        guard case .connected(let simple) = try run(plain, takesChunks: false) else {
            Issue.record("not connected")
            return
        }
        #expect(simple.mode == .simple)
    }

    @Test func nothingIsAskedBeforeTLSThatTheServerWants() throws {
        guard case .listed(let exports, _) = try run(.list, tls: .required, usesTLS: true) else {
            Issue.record("not listed")
            return
        }
        #expect(exports.count == 1)
        #expect(throws: BlockError.self) { _ = try run(.list, tls: .required) }
        #expect(throws: BlockError.self) { _ = try run(.list, usesTLS: true) }
    }

    @Test func anExportThatIsNotThereIsNotFound() {
        do throws(BlockError) {
            _ = try run(.use(name: "none", contexts: []))
            Issue.record("it was used")
        } catch {
            #expect(error.code == .notFound && error.message.contains("'none'"), "\(error)")
        }
    }

    /// What a server may send in place of its part.
    @Test(arguments: [
        ([UInt8](repeating: 0, count: 18), "greet"),
        (
            ClientBytes.bigEndian(NBDMagic.greeting)
                + ClientBytes.bigEndian(UInt64(0x0042_0281_8612_53)), "old"
        ),
        (
            ClientBytes.bigEndian(NBDMagic.greeting) + ClientBytes.bigEndian(NBDMagic.option)
                + [0, 2], "newstyle"
        ),
        (NBDHandshake.greeting + [UInt8](repeating: 7, count: 20), "magic"),
        (
            NBDHandshake.greeting + ClientBytes.bigEndian(NBDMagic.optionReply)
                + ClientBytes.bigEndian(UInt32(8)) + ClientBytes.bigEndian(UInt32(1))
                + ClientBytes.bigEndian(UInt32.max), "bytes"
        ),
        (
            NBDHandshake.greeting + ClientBytes.bigEndian(NBDMagic.optionReply)
                + ClientBytes.bigEndian(UInt32(8)) + ClientBytes.bigEndian(UInt32(2))
                + ClientBytes.bigEndian(UInt32(0)), "out of place"
        ),
    ])
    func whatNoServerSaysIsRefused(bytes: [UInt8], part: String) {
        var client = NBDClientHandshake(.list)
        do throws(BlockError) {
            for _ in 0..<100 {
                if case .receive = try client.advance() {
                    bytes.withUnsafeBytes { client.receive($0) }
                }
            }
            Issue.record("it was taken")
        } catch {
            #expect(error.message.contains(part), "\(error)")
        }
    }

    @Test func randomRepliesEndInAnErrorOrAWait() {
        for seed in UInt64(1)...200 {
            var random = seed
            func next() -> UInt64 {
                random = random &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                return random >> 33
            }
            var client = NBDClientHandshake(next() % 2 == 0 ? .list : .use(name: "x", contexts: []))
            NBDHandshake.greeting.withUnsafeBytes { client.receive($0) }
            do throws(BlockError) {
                for _ in 0..<200 {
                    guard case .receive = try client.advance() else { continue }
                    var data = (0..<(next() % 40)).map { _ in UInt8(truncatingIfNeeded: next()) }
                    if next() % 2 == 0 { data = ClientBytes.bigEndian(UInt32(2)) + [65, 66] }
                    let types: [UInt32] = [1, 2, 3, 4, 0x8000_0001, 0x8000_0006]
                    let bytes =
                        ClientBytes.bigEndian(NBDMagic.optionReply)
                        + ClientBytes.bigEndian(UInt32(3))
                        + ClientBytes.bigEndian(types[Int(next() % 6)])
                        + ClientBytes.bigEndian(UInt32(data.count)) + data
                    bytes.withUnsafeBytes { client.receive($0) }
                }
            } catch {
                #expect(!error.message.isEmpty, "seed \(seed)")
            }
        }
    }
}
