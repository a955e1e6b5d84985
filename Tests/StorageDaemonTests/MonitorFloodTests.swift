import BlockCore
import BlockIO
import QMP
import Testing

@testable import StorageDaemon

/// QMP clients that send and send, and take no replies.
@Suite struct MonitorFloodTests {
    /// Sends commands without end and takes nothing but the first replies.
    private final class Flood: MonitorChannel, @unchecked Sendable {
        private let commands: [UInt8]
        private var isNegotiated = false
        private var sendCount = 0
        private(set) var received = 0
        /// The daemon would take this and more.
        static let bytesMax = 4 << 20
        private var sleepers: [UnsafeContinuation<Void, Never>] = []
        private var isOver = false

        init(_ command: String) {
            commands = Array(String(repeating: command + "\n", count: 200).utf8)
        }

        func receive(_ vector: IOVector) async throws(BlockError) -> Int {
            guard isNegotiated else {
                isNegotiated = true
                let text = #"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#
                return put(Array(text.utf8), in: vector)
            }
            if received >= Self.bytesMax { await untilOver() }
            if isOver { return 0 }
            let count = put(Array(commands.prefix(vector.count)), in: vector)
            received += count
            return count
        }

        private func put(_ bytes: [UInt8], in vector: IOVector) -> Int {
            bytes.withUnsafeBytes { vector.slice(0, bytes.count).copy(from: $0) }
            return bytes.count
        }

        func send(_ vector: IOVector) async throws(BlockError) {
            sendCount += 1
            if sendCount > 2 { await untilOver() }
        }

        private func untilOver() async {
            if !isOver { await withUnsafeContinuation { sleepers.append($0) } }
        }

        func shutdown() {
            isOver = true
            let woken = sleepers
            sleepers = []
            for sleeper in woken { sleeper.resume() }
        }

        func close() {}
    }

    @Test(arguments: [
        #"{"exec-oob":"query-commands"}"#, #"{"execute":"query-commands"}"#,
    ]) func aFloodIsNotTakenBeforeItsRepliesLeave(command: String) async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let received = try await thread.run { () async throws(BlockError) -> Int in
            let daemon = StorageDaemon(on: thread)
            let flood = Flood(command)
            let connection = MonitorConnection(flood, daemon: daemon, isPretty: false)
            let task = thread.spawn { await connection.run() }
            for _ in 0..<20_000 { await thread.yield() }
            connection.abort()
            await task.value
            return flood.received
        }
        // A reply is hundreds of times as long as its command.
        #expect(received > 0 && received < 1 << 20, "\(received) bytes of commands")
    }
}
