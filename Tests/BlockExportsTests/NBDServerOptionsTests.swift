import BlockCore
import BlockIO
import Testing

@testable import BlockExports

@Suite struct NBDServerOptionsTests {
    @Test(arguments: [
        (0, UInt64(0)), (10, 10_000_000_000), (Int.max, UInt64.max), (-1, 0),
    ]) func aHandshakeLimitOfAnyLengthIsTaken(seconds: Int, nanoseconds: UInt64) throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        var options = NBDServer.Options()
        options.handshakeSeconds = seconds
        #expect(NBDServer(on: thread, options).handshakeNanoseconds == nanoseconds)
    }
}
