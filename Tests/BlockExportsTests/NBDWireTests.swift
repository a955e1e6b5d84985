import BlockCore
import BlockTLS
import BlockTesting
import Foundation
import Testing

@testable import BlockExports

/// The server and clients that behave in ways that programs do not.
@Suite struct NBDWireTests {
    typealias Raw = RawClient

    // MARK: Extended headers

    static let extended = Raw.option(11)

    @Test func extendedHeadersCarryEveryCommand() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter(options: [
                Self.extended, Raw.contexts("disk", ["base:allocation", "qemu:allocation-depth"]),
            ])
            let data = [UInt8](repeating: 0x77, count: 4_096)
            client.send(Raw.extendedRequest(1, 8_192, 4_096, cookie: 7, flags: 32) + data)
            var reply = try #require(client.extendedReply())
            #expect(reply.flags == 1 && reply.type == 0 && reply.cookie == 7)
            client.send(Raw.extendedRequest(0, 8_192, 4_096, cookie: 8))
            reply = try #require(client.extendedReply())
            #expect(reply.type == 1 && reply.data == Raw.bigEndian(UInt64(8_192)) + data)
            for type in [UInt16(3), 4, 5, 6] {
                client.send(Raw.extendedRequest(type, 1 << 20, type == 3 ? 0 : 7 << 20))
                reply = try #require(client.extendedReply())
                #expect(reply.flags == 1 && reply.type == 0, "command \(type)")
            }
            // The whole of it trimmed, zeroed: one chunk that says zeroes.
            client.send(Raw.extendedRequest(0, 1 << 20, 1 << 20))
            reply = try #require(client.extendedReply())
            #expect(reply.type == 2 && reply.data.count == 12)
        }
    }

    @Test func extendedBlockStatusAnswersForTheContextsAskedFor() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter(
                "fixed",
                options: [
                    Self.extended,
                    Raw.contexts("fixed", ["base:allocation", "qemu:allocation-depth"]),
                ])
            client.send(Raw.extendedRequest(7, 0, 8 << 20))
            let first = try #require(client.extendedReply())
            let second = try #require(client.extendedReply())
            #expect(first.type == 6 && first.flags == 0 && second.type == 6 && second.flags == 1)
            // Data, hole, data, hole, data: 16 bytes each behind the id and the count.
            #expect(first.data.count == 8 + 5 * 16)
            let payload = Raw.bigEndian(UInt64(8 << 20)) + [0, 0, 0, 1]
            client.send(Raw.extendedRequest(7, 0, UInt64(payload.count), flags: 32) + payload)
            let only = try #require(client.extendedReply())
            #expect(only.flags == 1 && only.data.starts(with: [0, 0, 0, 1]))
            let wrong = Raw.bigEndian(UInt64(8 << 20)) + [0, 0, 0, 9]
            client.send(Raw.extendedRequest(7, 0, UInt64(wrong.count), flags: 32) + wrong)
            let refused = try #require(client.extendedReply())
            #expect(refused.type == 0x8001 && refused.data.starts(with: [0, 0, 0, 22]))
        }
    }

    @Test func refusedRequestsAreToldWhatIsWrong() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter(options: [Self.extended])
            client.send(Raw.extendedRequest(0, 8 << 20, 1, cookie: 9))
            let reply = try #require(client.extendedReply())
            #expect(reply.type == 0x8001 && reply.cookie == 9)
            #expect(reply.data.starts(with: [0, 0, 0, 22]))
            let message = String(decoding: reply.data.dropFirst(6), as: UTF8.self)
            #expect(
                message
                    == "READ of 1 bytes at 8388608 reaches past the end of the export at 8388608")
        }
    }

    // MARK: Framing

    /// A small reply waits for the end of the turn, a large one behind it takes it along at once.
    @Test func aClientThatLeavesRightAfterItsRequestsIsLetGo() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter()
            // Written first, so that the reads need not wait for the disk.
            client.send(Raw.request(1, 0, 128 << 10) + [UInt8](repeating: 5, count: 128 << 10))
            #expect(client.receive(16).count == 16)
            client.send(
                Raw.request(0, 0, 512, cookie: 1) + Raw.request(0, 0, 64 << 10, cookie: 2)
                    + Raw.request(2, 0, 0, cookie: 3))
            #expect(client.receive(32 + 512 + (64 << 10)).count == 32 + 512 + (64 << 10))
            #expect(client.isClosed())
        }
    }

    @Test func aPayloadOverTheLimitIsRefusedAndTheConnectionGoesOn() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter()
            client.send(Raw.request(1, 0, (32 << 20) + 1))
            client.send([UInt8](repeating: 1, count: (32 << 20) + 1))
            #expect(client.receive(16)[4..<8].elementsEqual([0, 0, 0, 28]))
            client.send(Raw.request(0, 0, 16, cookie: 2))
            #expect(client.receive(32).count == 32)
        }
    }

    @Test func aPayloadThatCannotBeSwallowedEndsTheConnection() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter()
            client.send(Raw.request(1, 0, .max))
            #expect(client.isClosed())
        }
    }

    @Test func aRequestWithoutItsMagicEndsTheConnection() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter()
            client.send([UInt8](repeating: 0x55, count: 28))
            #expect(client.isClosed())
        }
    }

    @Test func requestsThatCameBeforeTheEndAreAllAnswered() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(unix: server.socketPath)
            client.enter()
            for index in 0..<200 { client.send(Raw.request(0, UInt64(index) * 512, 512)) }
            client.finishSending()
            #expect(client.receive(1 << 20).count == 200 * (16 + 512))
        }
    }

    @Test func bytesOneByOneAreUnderstood() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(port: server.port)
            let data: [UInt8] = [1, 2, 3, 4, 5, 6, 7, 8]
            let conversation =
                Raw.flags + Raw.option(8) + Raw.go("disk") + Raw.request(1, 100, 8) + data
                + Raw.request(2, 0, 0)
            for byte in conversation { client.send([byte]) }
            #expect(client.isClosed())
            #expect(try server.contents()[100..<108].elementsEqual(data))
        }
    }

    static let conversation: [UInt8] =
        Raw.flags + Raw.option(8) + Raw.option(3) + Raw.contexts("disk", ["base:allocation"])
        + Raw.go("disk") + Raw.request(0, 0, 512) + Raw.request(7, 0, 1 << 20)
        + Raw.request(1, 4 << 20, 64) + [UInt8](repeating: 9, count: 64) + Raw.request(3, 0, 0)

    @Test func aClientMayLeaveAtAnyByte() async throws {
        try await NBDTestServer.with { server in
            for count in 0...Self.conversation.count {
                let client =
                    try count % 2 == 0 ? Raw(unix: server.socketPath) : Raw(port: server.port)
                client.send(Array(Self.conversation[..<count]))
                if count % 3 == 0 { client.reset() } else { client.close() }
            }
            try await Self.untilNobodyIsThere(server)
            try server.check(["nbdinfo", server.uri()])
        }
    }

    @Test func garbageAtAnyByteLeavesTheServerAlone() async throws {
        let seed = UInt64.random(in: 0 ... .max)
        var random = SystemSeeded(state: seed)
        try await NBDTestServer.with { server in
            for count in stride(from: 0, through: Self.conversation.count, by: 3) {
                let client = try Raw(unix: server.socketPath)
                client.send(
                    Array(Self.conversation[..<count])
                        + (0..<200).map { _ in UInt8(truncatingIfNeeded: random.next()) })
                client.close()
            }
            try await Self.untilNobodyIsThere(server)
            let output = try server.run(["nbdinfo", server.uri()])
            #expect(output.status == 0, "seed \(seed): \(output.text)")
        }
    }

    static func untilNobodyIsThere(_ server: NBDTestServer) async throws {
        while try await server.clientCount > 0 { try await Task.sleep(for: .milliseconds(5)) }
    }

    // MARK: Limits

    @Test func aClientThatDoesNotNegotiateIsCutOff() async throws {
        var options = NBDServer.Options()
        options.handshakeSeconds = 1
        try await NBDTestServer.with(options: options) { server in
            let silent = try Raw(unix: server.socketPath)
            let slow = try Raw(unix: server.socketPath)
            let good = try Raw(unix: server.socketPath)
            slow.send(Raw.flags + Raw.option(3))
            good.enter()
            #expect(silent.isClosed())
            #expect(slow.isClosed())
            good.send(Raw.request(0, 0, 16))
            #expect(good.receive(32).count == 32)
        }
    }

    @Test func oneClientTooManyWaitsUntilAPlaceIsFree() async throws {
        var options = NBDServer.Options()
        options.connectionCountMax = 2
        try await NBDTestServer.with(options: options) { server in
            let first = try Raw(unix: server.socketPath)
            let second = try Raw(unix: server.socketPath)
            first.enter()
            second.enter()
            let third = try Raw(unix: server.socketPath)
            second.send(Raw.request(0, 0, 16))
            #expect(second.receive(32).count == 32)
            #expect(try await server.clientCount == 2)
            first.close()
            third.enter()
        }
    }

    @Test func clientsThatComeOneAfterTheOtherAllGetTheOnlyPlace() async throws {
        var options = NBDServer.Options()
        options.connectionCountMax = 1
        try await NBDTestServer.with(options: options) { server in
            for index in 0..<100 {
                let client = try Raw(unix: server.socketPath)
                client.enter()
                client.send(Raw.request(0, 0, 16))
                #expect(client.receive(32).count == 32, "client \(index)")
                // Without a goodbye.
                client.close()
            }
        }
    }

    @Test func aClientThatLeftItsRequestsBehindDoesNotTakeAPlace() async throws {
        var options = NBDServer.Options()
        options.connectionCountMax = 1
        try await NBDTestServer.with(options: options, slow: true) { server in
            let first = try Raw(unix: server.socketPath)
            first.enter("slow")
            for cookie in 0..<64 { first.send(Raw.request(0, 0, 512, cookie: UInt64(cookie))) }
            first.close()
            let second = try Raw(unix: server.socketPath)
            second.enter()
            second.send(Raw.request(0, 0, 16))
            #expect(second.receive(32).count == 32)
        }
    }

    @Test func clientsThatDoNotReadHoldAsMuchTogetherAsTheServerAllows() async throws {
        var options = NBDServer.Options()
        options.bytesInFlightMax = 16 << 20
        try await NBDTestServer.with(options: options) { server in
            var slow: [Raw] = []
            for _ in 0..<8 {
                let client = try Raw(unix: server.socketPath)
                client.enter()
                client.send((0..<64).flatMap { Raw.request(0, 0, 1 << 20, cookie: UInt64($0)) })
                slow.append(client)
            }
            let other = try Raw(unix: server.socketPath)
            other.enter()
            for _ in 0..<100 {
                other.send(Raw.request(0, 0, 4_096))
                #expect(other.receive(4_112).count == 4_112)
            }
            let held = try await server.bytesInFlight.reduce(0, +)
            // Beside what all may hold, a share and a request or two of each.
            #expect(held > 0 && held <= (16 << 20) + 8 * (3 << 20), "\(held)")
        }
    }

    @Test func aClientThatDoesNotReadHoldsUpNobodyAndLittleMemory() async throws {
        try await NBDTestServer.with { server in
            let slow = try Raw(unix: server.socketPath)
            slow.enter()
            // Far more replies than the limits allow: at some point the server stops receiving.
            // In one piece, which the socket takes whether or not the server receives it.
            slow.send((0..<400).flatMap { Raw.request(0, 0, 8 << 20, cookie: UInt64($0)) })
            let other = try Raw(unix: server.socketPath)
            other.enter()
            for _ in 0..<100 {
                other.send(Raw.request(0, 0, 4_096))
                #expect(other.receive(4_112).count == 4_112)
            }
            let held = try await server.bytesInFlight
            #expect(
                held.allSatisfy { $0 <= NBDConnection.readingBytesMax + (1 << 20) }, "\(held)")
            #expect(held.contains { $0 > 0 })
        }
    }

    /// Requests for all of the disk, a quarter of a MiB each, several times over.
    private static let manyReads = (0..<64).map {
        Raw.request(0, UInt64($0 % 32 * readBytes), UInt32(readBytes), cookie: UInt64($0))
    }
    private static let readBytes = NBDTestServer.size / 32

    @Test func readsBeginAsTheClientTakesReplies() async throws {
        try await NBDTestServer.with { server in
            let disk = try [UInt8](server.contents())
            let slow = try Raw(unix: server.socketPath)
            slow.enter()
            slow.send(Self.manyReads.flatMap { $0 })
            // When it is answered, those before it have been received.
            let witness = try Raw(unix: server.socketPath)
            witness.enter("fixed")
            witness.send(Raw.request(0, 0, 16))
            #expect(witness.receive(32).count == 32)
            let begun = try await server.readCount()
            #expect(begun < 16)
            var cookies: Set<Int> = []
            for _ in Self.manyReads {
                let reply = slow.receive(16 + Self.readBytes)
                try #require(reply.count == 16 + Self.readBytes)
                let cookie = reply[8..<16].reduce(0) { $0 << 8 | Int($1) }
                cookies.insert(cookie)
                let start = cookie % 32 * Self.readBytes
                #expect(reply[16...].elementsEqual(disk[start..<start + Self.readBytes]))
            }
            #expect(cookies == Set(0..<64))
        }
    }

    @Test(.timeLimit(.minutes(5)))
    func aWriteDoesNotWaitForReadsWhoseRepliesNobodyTakes() async throws {
        try await NBDTestServer.with { server in
            let slow = try Raw(unix: server.socketPath)
            slow.enter()
            slow.send(Self.manyReads.flatMap { $0 })
            let payload = [UInt8](repeating: 0x5a, count: 1 << 20)
            slow.send(Raw.request(1, 2 << 20, 1 << 20, cookie: 99) + payload)
            let other = try Raw(unix: server.socketPath)
            other.enter()
            while true {
                other.send(Raw.request(0, 3 << 20 - 512, 512))
                let reply = other.receive(16 + 512)
                try #require(reply.count == 16 + 512)
                if reply[16...].allSatisfy({ $0 == 0x5a }) { break }
            }
        }
    }

    @Test func aClientMayLeaveWhileItsReadsWait() async throws {
        try await NBDTestServer.with { server in
            for resets in [false, true] {
                let client = try Raw(unix: server.socketPath)
                client.enter()
                client.send(Self.manyReads.flatMap { $0 })
                if resets { client.reset() } else { client.close() }
            }
            try await Self.untilNobodyIsThere(server)
            #expect(try await server.readCount() < 64)
            try server.check(["nbdinfo", server.uri()])
        }
    }

    // MARK: Ends

    /// What a client has sent when the server stops, and what it leaves unread.
    static let states: [(String, [UInt8])] = [
        ("connected", []), ("flags", Raw.flags), ("within an option", Raw.flags + [0x49, 0x48]),
        ("within a huge option", Raw.flags + Array("IHAVEOPT".utf8) + [0, 0, 0, 3, 1, 0, 0, 0, 7]),
        ("between options", Raw.flags + Raw.option(8) + Raw.option(3)),
        ("transmitting", Raw.flags + Raw.go("disk")),
        ("within a header", Raw.flags + Raw.go("disk") + [0x25, 0x60]),
        ("within a payload", Raw.flags + Raw.go("disk") + Raw.request(1, 0, 1 << 20) + [1, 2, 3]),
        (
            "within a payload that is refused",
            Raw.flags + Raw.go("fixed") + Raw.request(1, 0, 1 << 20) + [1, 2, 3]
        ),
        (
            "not reading replies",
            Raw.flags + Raw.go("disk")
                + (0..<64).flatMap { Raw.request(0, 0, 8 << 20, cookie: UInt64($0)) }
        ),
        (
            "not reading status",
            Raw.flags + Raw.option(8) + Raw.contexts("disk", ["base:allocation"]) + Raw.go("disk")
                + (0..<300).flatMap { Raw.request(7, 0, 8 << 20, cookie: UInt64($0)) }
        ),
    ]

    @Test func theServerStopsWhateverItsClientsDo() async throws {
        for (state, bytes) in Self.states {
            try await NBDTestServer.with { server in
                let clients = [try Raw(unix: server.socketPath), try Raw(port: server.port)]
                for client in clients { client.send(bytes) }
                // At least one more has come all the way in, so the others have been received from.
                let witness = try Raw(unix: server.socketPath)
                witness.enter()
                try await server.stop()
                for client in clients + [witness] { #expect(client.isClosed(), "\(state)") }
                #expect(!FileManager.default.fileExists(atPath: server.socketPath))
            }
        }
    }

    @Test func whatIsInFlightIsRepliedToWhenTheServerStops() async throws {
        try await NBDTestServer.with(slow: true) { server in
            let client = try Raw(unix: server.socketPath)
            client.enter("slow")
            client.send(Raw.request(1, 0, 512, cookie: 5) + [UInt8](repeating: 1, count: 512))
            client.send(Raw.request(0, 0, 512, cookie: 6))
            while try await server.bytesInFlight.reduce(0, +) < 1_024 {}
            try await server.stop()
            // A write's reply, a read's reply with its data, and the end.
            #expect(client.receive(1 << 16).count == 16 + 16 + 512)
        }
    }

    @Test func theServerStopsInAHandshakeOfTLS() async throws {
        var options = NBDServer.Options()
        options.credentials = try .x509(
            directory: TestCertificates.path("x509"), endpoint: .server)
        for bytes: [UInt8] in [[], [0x16], [0x16, 3, 1, 0, 200, 1]] {
            try await NBDTestServer.with(options: options) { server in
                let client = try Raw(unix: server.socketPath)
                #expect(client.receive(18).count == 18)
                client.send(Raw.flags + Raw.option(5))
                #expect(client.endOfReplies() == 1)
                client.send(bytes)
                try await server.stop()
                #expect(client.isClosed())
            }
        }
    }

    @Test func plaintextBehindStartTLSEndsTheConnection() async throws {
        var options = NBDServer.Options()
        options.credentials = try .x509(
            directory: TestCertificates.path("x509"), endpoint: .server)
        try await NBDTestServer.with(options: options) { server in
            let client = try Raw(unix: server.socketPath)
            client.send(Raw.flags + Raw.option(5) + Raw.option(3))
            #expect(client.receive(100).count == 18)
            #expect(client.isClosed())
        }
    }

    @Test func aRemovedExportLetsItsClientsGoAndOthersStay() async throws {
        try await NBDTestServer.with { server in
            let leaving = try Raw(unix: server.socketPath)
            let staying = try Raw(unix: server.socketPath)
            leaving.enter("disk")
            staying.enter("fixed")
            leaving.send((0..<64).flatMap { Raw.request(0, 0, 1 << 20, cookie: UInt64($0)) })
            try await server.removeExport("disk")
            #expect(leaving.isClosed())
            staying.send(Raw.request(0, 0, 512))
            #expect(staying.receive(528).count == 528)
            #expect(try server.run(["nbdinfo", server.uri("disk")]).status != 0)
        }
    }

    @Test func whatWasAcknowledgedSurvivesAClientThatVanishes() async throws {
        try await NBDTestServer.with { server in
            let client = try Raw(port: server.port)
            client.enter()
            let data = [UInt8](repeating: 0xd7, count: 4_096)
            client.send(Raw.request(1, 512, 4_096) + data)
            #expect(client.receive(16).count == 16)
            client.send(Raw.request(1, 0, 1 << 20) + data)
            client.reset()
            try await Self.untilNobodyIsThere(server)
            let disk = try server.contents()
            #expect(disk[512..<4_608].elementsEqual(data))
            // Half a payload is no write.
            #expect(disk[0] == 1 && disk[4_608] != 0xd7)
        }
    }
}

/// A small seeded generator.
struct SystemSeeded: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return (state >> 33) ^ (state << 31)
    }
}
