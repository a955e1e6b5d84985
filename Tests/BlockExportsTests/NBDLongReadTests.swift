import Foundation
import Testing

@testable import BlockExports

/// Reads that are longer than what the server wants to hold for them.
@Suite struct NBDLongReadTests {
    typealias Raw = RawClient

    private static let size = NBDTestServer.size
    private static let readCount = 2

    /// A server that holds as much as it may with the first byte.
    private static func withBusyServer(
        _ body: (NBDTestServer) async throws -> Void
    ) async throws {
        var options = NBDServer.Options()
        options.bytesInFlightMax = 0
        try await NBDTestServer.with(options: options, body)
    }

    /// A client of the export `disk`, with extended replies, that has asked for all of the disk several times.
    private static func askForMuch(
        _ server: NBDTestServer, flags: UInt16 = 0
    ) throws -> Raw {
        let client = try Raw(unix: server.socketPath)
        client.enter(options: [Raw.option(11)])
        for cookie in 0..<readCount {
            client.send(
                Raw.extendedRequest(0, 0, UInt64(size), cookie: UInt64(cookie), flags: flags))
        }
        return client
    }

    private static func fill(_ server: NBDTestServer) throws -> [UInt8] {
        let bytes = (0..<size / 512).flatMap {
            [UInt8](repeating: UInt8(truncatingIfNeeded: $0) | 1, count: 512)
        }
        let client = try Raw(unix: server.socketPath)
        client.enter()
        client.send(Raw.request(1, 0, UInt32(size)) + bytes)
        #expect(client.receive(16).count == 16)
        client.close()
        return bytes
    }

    @Test func aLongReadGoesInPiecesWhileClientsHoldMuch() async throws {
        try await Self.withBusyServer { server in
            let disk = try Self.fill(server)
            let client = try Self.askForMuch(server)
            let witness = try Raw(unix: server.socketPath)
            witness.enter("fixed")
            witness.send(Raw.request(0, 0, 16))
            #expect(witness.receive(32).count == 32)
            // A piece that is read, and one whose reply waits.
            let held = try await server.bytesInFlight
            #expect(held.allSatisfy { $0 <= 3 << 20 }, "\(held)")
            for _ in 0..<Self.readCount {
                var next = 0
                while next < Self.size {
                    let reply = try #require(client.extendedReply())
                    try #require(reply.type == 1 && reply.data.count > 8)
                    #expect(reply.data.count <= 8 + NBDRequestExecution.pieceBytesMax)
                    let offset = reply.data[..<8].reduce(0) { $0 << 8 | Int($1) }
                    #expect(offset == next)
                    next = offset + reply.data.count - 8
                    #expect(Data(reply.data[8...]) == Data(disk[offset..<next]))
                    #expect((reply.flags & 1 == 1) == (next == Self.size))
                }
            }
        }
    }

    @Test func aReadThatMayNotBeDividedIsNot() async throws {
        try await Self.withBusyServer { server in
            let disk = try Self.fill(server)
            // NBD_CMD_FLAG_DF
            let client = try Self.askForMuch(server, flags: 4)
            for _ in 0..<Self.readCount {
                let reply = try #require(client.extendedReply())
                #expect(reply.type == 1 && reply.flags & 1 == 1)
                #expect(Data(reply.data.dropFirst(8)) == Data(disk))
            }
        }
    }

    @Test func aClientMayLeaveInTheMiddleOfALongRead() async throws {
        try await Self.withBusyServer { server in
            _ = try Self.fill(server)
            let client = try Self.askForMuch(server)
            _ = client.receive(1 << 20)
            client.reset()
            while try await server.clientCount > 0 {}
            #expect(try await server.bytesInFlight.isEmpty)
        }
    }
}
