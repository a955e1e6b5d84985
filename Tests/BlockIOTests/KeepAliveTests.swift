import BlockCore
import Foundation
import Testing

@testable import BlockIO

/// How connections find out that their peer is gone.
@Suite struct KeepAliveTests {
    /// A TCP connection that a listener with `keepAlive` took, looked at by `body`.
    private func accepting<T: Sendable>(
        _ keepAlive: KeepAlive, _ body: @escaping @Sendable (Int32) -> T
    ) async throws -> T {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> T in
            let listener = try Listener(on: .ipv4(address: 0x7f00_0001, port: 0), thread: thread)
            listener.keepAlive = keepAlive
            let client = try await Socket.connect(to: listener.address, on: thread)
            guard let server = try await listener.accept() else {
                throw BlockError(.disconnected, "no connection came")
            }
            let result = body(server.handle.rawValue)
            for socket in [client, server] { socket.close() }
            listener.close()
            return result
        }
    }

    private static func option(_ socket: Int32, _ level: Int32, _ name: Int32) -> Int32 {
        var value: Int32 = -1
        var size = socklen_t(MemoryLayout<Int32>.size)
        getsockopt(socket, level, name, &value, &size)
        return value
    }

    @Test func connectionsAreProbedUnlessThatIsTurnedOff() async throws {
        let usual = try await accepting(KeepAlive()) {
            Self.option($0, SOL_SOCKET, SO_KEEPALIVE)
        }
        #expect(usual != 0)
        var off = KeepAlive()
        off.isOn = false
        #expect(try await accepting(off) { Self.option($0, SOL_SOCKET, SO_KEEPALIVE) } == 0)
    }

    @Test func probesFollowTheTimesThatAreAskedFor() async throws {
        var times = KeepAlive()
        times.idleSeconds = 11
        times.intervalSeconds = 12
        times.probeCount = 13
        let found = try await accepting(times) { socket in
            [TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT].map {
                Self.option(socket, Int32(IPPROTO_TCP), $0)
            }
        }
        #expect(found == [11, 12, 13])
    }

    @Test func namesAreNotLookedUpWhereNumbersAreWanted() throws {
        #expect(throws: BlockError.self) {
            try SocketAddress.resolve(host: "localhost", port: 1, passive: false, numeric: true)
        }
        let found = try SocketAddress.resolve(
            host: "127.0.0.1", port: 1, passive: false, numeric: true)
        #expect(found == [.ipv4(address: 0x7f00_0001, port: 1)])
    }
}
