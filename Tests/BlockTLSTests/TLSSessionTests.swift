import BlockCore
import BlockTesting
import Foundation
import Testing

@testable import BlockTLS

/// A client and a server whose ciphertext goes to each other in memory.
final class Pair {
    let server: TLSSession
    let client: TLSSession
    /// How much of what was sent is delivered at once.
    var pieceCount = Int.max
    var serverError: BlockError?
    var clientError: BlockError?

    init(
        _ server: TLSCredentials, _ client: TLSCredentials, hostname: String? = nil
    ) throws(BlockError) {
        self.server = try TLSSession(server)
        self.client = try TLSSession(client, hostname: hostname)
    }

    /// Carries ciphertext from one side to the other.
    func carry(_ from: TLSSession, to target: TLSSession) throws -> Int {
        let vector = from.takeCiphertext()
        var done = 0
        while done < vector.count {
            let count = min(pieceCount, vector.count - done)
            var copy: [IOSlice] = []
            vector.slice(done, count).forEachSegment { copy.append($0) }
            for slice in copy { try target.receive(slice) }
            done += count
        }
        return vector.count
    }

    /// Runs both handshakes to their ends, good or bad.
    func connect() throws {
        for _ in 0..<100 {
            var isDone = true
            do throws(BlockError) {
                if clientError == nil, try client.handshake() == .needsInput { isDone = false }
            } catch {
                clientError = error
            }
            let sent = try carry(client, to: server)
            do throws(BlockError) {
                if serverError == nil, try server.handshake() == .needsInput { isDone = false }
            } catch {
                serverError = error
            }
            let answered = try carry(server, to: client)
            if isDone, sent + answered == 0 { return }
            if sent + answered == 0, serverError != nil || clientError != nil { return }
        }
        Issue.record("the handshake does not end")
    }

    func read(_ session: TLSSession, _ count: Int = 1 << 16) throws(BlockError) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: count)
        var result = TLSSession.ReadResult.needsInput
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 16)
        defer { memory.deallocate() }
        result = try session.read(into: memory)
        guard case .bytes(let got) = result else { return nil }
        bytes = Array(memory[..<got])
        return bytes
    }
}

@Suite struct TLSSessionTests {
    func x509(
        _ endpoint: TLSEndpoint, _ name: String = "x509", verifiesPeer: Bool = true,
        verifiesIdentity: Bool = true
    ) throws(BlockError) -> TLSCredentials {
        try .x509(
            directory: TestCertificates.path(name), endpoint: endpoint, verifiesPeer: verifiesPeer,
            verifiesIdentity: verifiesIdentity)
    }

    func send(_ text: String, _ from: TLSSession) throws {
        try Array(text.utf8).withUnsafeBytes { try from.write($0) }
    }

    @Test func certificatesOnBothSidesConnect() throws {
        let pair = try Pair(x509(.server), x509(.client), hostname: "localhost")
        try pair.connect()
        #expect(pair.serverError == nil && pair.clientError == nil)
        #expect(pair.server.isEstablished && pair.client.isEstablished)
        #expect(pair.server.peerName?.contains("CN=Test client") == true)
        try send("hello", pair.client)
        _ = try pair.carry(pair.client, to: pair.server)
        #expect(try pair.read(pair.server) == Array("hello".utf8))
    }

    @Test(arguments: ["127.0.0.1", "::1", "localhost"])
    func addressesOfTheCertificateAreAccepted(hostname: String) throws {
        let pair = try Pair(x509(.server), x509(.client), hostname: hostname)
        try pair.connect()
        #expect(pair.clientError == nil, "\(String(describing: pair.clientError))")
    }

    @Test func sharedKeysConnectAndNameTheUser() throws {
        let pair = try Pair(
            .psk(directory: TestCertificates.path("psk"), endpoint: .server),
            .psk(directory: TestCertificates.path("psk"), endpoint: .client, username: "other"))
        try pair.connect()
        #expect(pair.serverError == nil && pair.clientError == nil)
        #expect(pair.server.peerName == "other")
    }

    @Test func aWrongSharedKeyIsRefused() throws {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        try "qemu:00112233445566778899aabbccddeeff\n".write(
            toFile: folder["keys.psk"], atomically: true, encoding: .utf8)
        let pair = try Pair(
            .psk(directory: TestCertificates.path("psk"), endpoint: .server),
            .psk(directory: folder.path, endpoint: .client))
        try pair.connect()
        #expect(pair.serverError != nil)
        #expect(!pair.server.isEstablished)
    }

    @Test func aServerOfAnotherAuthorityIsRefused() throws {
        let pair = try Pair(x509(.server, "stranger"), x509(.client), hostname: "localhost")
        try pair.connect()
        #expect(pair.clientError?.code == .permissionDenied)
        #expect(pair.clientError?.message.contains("not accepted") == true)
        #expect(pair.serverError != nil)
    }

    @Test func aServerOfAnotherNameIsRefused() throws {
        let pair = try Pair(x509(.server), x509(.client), hostname: "example.org")
        try pair.connect()
        #expect(pair.clientError?.code == .permissionDenied)
    }

    @Test func anExpiredServerIsRefused() throws {
        let pair = try Pair(
            x509(.server, "expired", verifiesIdentity: false), x509(.client), hostname: "localhost")
        try pair.connect()
        #expect(pair.clientError?.message.contains("expired") == true)
    }

    /// Certificates of one set under the names of another: the file names, and those in the set "x509".
    private func credentials(
        _ files: [(name: String, source: String)], _ endpoint: TLSEndpoint
    ) throws -> TLSCredentials {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        for file in files {
            try FileManager.default.copyItem(
                atPath: TestCertificates.path(file.source), toPath: folder[file.name])
        }
        return try .x509(directory: folder.path, endpoint: endpoint, verifiesPeer: false)
    }

    @Test(arguments: [
        ("expired/server", "x509/ca", "expired"), ("x509/client", "x509/ca", "purpose"),
        ("stranger/server", "x509/ca", "issuer"),
    ])
    func aServerDoesNotBeginWithACertificateThatPeersRefuse(
        identity: String, authority: String, part: String
    ) throws {
        do {
            _ = try credentials(
                [
                    ("server-cert.pem", identity + "-cert.pem"),
                    ("server-key.pem", identity + "-key.pem"),
                    ("ca-cert.pem", authority + "-cert.pem"),
                ], .server)
            Issue.record("it was taken")
        } catch let error as BlockError {
            #expect(error.code == .invalidArgument)
            #expect(error.message.contains("server-cert.pem"), "\(error)")
            #expect(error.message.contains(part), "\(error)")
        }
    }

    @Test func aServerWithoutAuthoritiesMayHaveACertificateOfAnybody() throws {
        func files(_ name: String) -> [(name: String, source: String)] {
            ["server-cert.pem", "server-key.pem"].map { ($0, "\(name)/\($0)") }
        }
        _ = try credentials(files("x509"), .server)
        #expect(throws: BlockError.self) { try credentials(files("expired"), .server) }
    }

    @Test func aClientOfAnotherAuthorityIsRefused() throws {
        let pair = try Pair(
            x509(.server), x509(.client, "stranger", verifiesPeer: false), hostname: "localhost")
        try pair.connect()
        #expect(pair.serverError?.code == .permissionDenied)
        // In TLS 1.3 the client is done before its certificate is judged: it learns on reading.
        if pair.clientError == nil {
            #expect(throws: BlockError.self) { try pair.read(pair.client) }
        }
    }

    @Test func aClientWithoutCertificateIsRefusedUnlessPeersAreNotVerified() throws {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        try FileManager.default.copyItem(
            atPath: TestCertificates.path("x509/ca-cert.pem"), toPath: folder["ca-cert.pem"])
        for verifiesPeer in [true, false] {
            let pair = try Pair(
                x509(.server, verifiesPeer: verifiesPeer),
                .x509(directory: folder.path, endpoint: .client), hostname: "localhost")
            try pair.connect()
            #expect((pair.serverError != nil) == verifiesPeer)
            if verifiesPeer { #expect(pair.serverError?.code == .permissionDenied) }
        }
    }

    @Test func versionsBelowTLS12AreRefusedWhateverThePriority() throws {
        let old = "NORMAL:-VERS-ALL:+VERS-TLS1.0:+VERS-TLS1.1"
        #expect(throws: BlockError.self) {
            let credentials = try TLSCredentials.x509(
                directory: TestCertificates.path("x509"), endpoint: .client, priority: old)
            let pair = try Pair(self.x509(.server), credentials)
            try pair.connect()
            if let error = pair.clientError { throw error }
        }
    }

    @Test func dataOfAnySizeSurvivesAnySplit() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let pair = try Pair(x509(.server), x509(.client), hostname: "localhost")
        pair.pieceCount = 7
        try pair.connect()
        for count in [1, 16_383, 16_384, 16_385, 300_000] {
            pair.pieceCount = 1 + Int(truncatingIfNeeded: seed &* UInt64(count) % 5_000)
            let bytes = (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31) }
            try bytes.withUnsafeBytes { try pair.server.write($0) }
            _ = try pair.carry(pair.server, to: pair.client)
            var got: [UInt8] = []
            while let part = try pair.read(pair.client) { got += part }
            #expect(got == bytes, "seed \(seed), \(count) bytes")
        }
    }

    @Test func aGoodbyeEndsTheStream() throws {
        let pair = try Pair(x509(.server), x509(.client), hostname: "localhost")
        try pair.connect()
        pair.server.close()
        _ = try pair.carry(pair.server, to: pair.client)
        pair.client.receiveEnd()
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: 16, alignment: 16)
        defer { memory.deallocate() }
        #expect(try pair.client.read(into: memory) == .closed)
    }

    @Test func anEndWithoutGoodbyeIsAnError() throws {
        let pair = try Pair(x509(.server), x509(.client), hostname: "localhost")
        try pair.connect()
        #expect(try pair.read(pair.client) == nil)
        pair.client.receiveEnd()
        #expect {
            try pair.read(pair.client)
        } throws: {
            ($0 as? BlockError)?.code == .disconnected
        }
    }

    @Test func changedCiphertextIsAnError() throws {
        let pair = try Pair(x509(.server), x509(.client), hostname: "localhost")
        try pair.connect()
        try send("hello", pair.client)
        let vector = pair.client.takeCiphertext()
        guard let slice = vector.single else {
            Issue.record("not one slice")
            return
        }
        slice.bytes[slice.count - 1] ^= 1
        try pair.server.receive(slice)
        #expect {
            try pair.read(pair.server)
        } throws: {
            ($0 as? BlockError)?.code == .protocolViolation
        }
    }

    @Test func garbageInPlaceOfAHandshakeIsAnError() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var state = seed
        for length in [1, 5, 6, 100, 5_000] {
            let session = try TLSSession(x509(.server))
            let bytes = (0..<length).map { _ -> UInt8 in
                state = state &* 6_364_136_223_846_793_005 &+ 1
                return UInt8(truncatingIfNeeded: state >> 33)
            }
            let vector = try bytes.withUnsafeBytes { try IOVector(copying: $0) }
            if let slice = vector.single { try session.receive(slice) }
            session.receiveEnd()
            #expect(throws: BlockError.self, "seed \(seed)") { try session.handshake() }
        }
    }

    @Test func missingFilesAreNamed() {
        for endpoint in TLSEndpoint.allCases {
            #expect {
                _ = try TLSCredentials.x509(directory: "/nonexistent", endpoint: endpoint)
            } throws: {
                let error = $0 as? BlockError
                return error?.code == .notFound
                    && error?.message.contains("/nonexistent/ca-cert.pem") == true
            }
        }
        #expect(throws: BlockError.self) {
            _ = try TLSCredentials.psk(directory: "/nonexistent", endpoint: .server)
        }
        #expect(throws: BlockError.self) {
            _ = try TLSCredentials.psk(
                directory: TestCertificates.path("psk"), endpoint: .client, username: "nobody")
        }
        #expect(throws: BlockError.self) {
            _ = try TLSCredentials.x509(
                directory: TestCertificates.path("x509"), endpoint: .server, priority: "NONSENSE")
        }
    }

    @Test func keyFilesAreParsedStrictly() throws {
        let good = try SharedKeys.parse(Array("# x\n\na:00fF\r\nb:11".utf8), path: "k")
        #expect(good == ["a": [0, 255], "b": [17]])
        for bad in ["a", ":00", "a:", "a:0", "a:0g", "a:00 "] {
            #expect(throws: BlockError.self, "\(bad)") {
                try SharedKeys.parse(Array(bad.utf8), path: "k")
            }
        }
    }

    @Test func sidesWithoutCredentialsConnectAnonymously() throws {
        let pair = try Pair(.anonymous(endpoint: .server), .anonymous(endpoint: .client))
        try pair.connect()
        #expect(pair.server.isEstablished && pair.client.isEstablished)
        #expect(pair.server.peerName == nil)
        try send("hello", pair.client)
        _ = try pair.carry(pair.client, to: pair.server)
        #expect(try pair.read(pair.server) == Array("hello".utf8))
    }

    @Test func anAnonymousClientDoesNotPassForOneWithACertificate() throws {
        let pair = try Pair(x509(.server), .anonymous(endpoint: .client))
        try pair.connect()
        #expect(!pair.server.isEstablished)
    }
}
