import BlockCore
import BlockIO
import BlockTesting
import Foundation
import QMP
import Synchronization
import Testing

@testable import StorageDaemon

/// A daemon on a thread of its own, with its files and sockets in a private directory.
final class MonitoredDaemon: Sendable {
    private let place: TemporaryFolder
    var folder: String { place.path }
    private let outcome = Mutex<Result<Void, BlockError>?>(nil)

    var socketPath: String { "\(folder)/qmp" }

    /// Runs `body` beside a daemon with a monitor at ``socketPath`` and what `arguments` say; `$` in
    /// them stands for the directory. Asks the daemon to end afterwards, and expects it to end well.
    static func with(
        _ arguments: [String] = [], _ body: (MonitoredDaemon) async throws -> Void
    ) async throws {
        let daemon = try MonitoredDaemon()
        defer { daemon.place.remove() }
        try daemon.start(arguments)
        do {
            try await body(daemon)
        } catch {
            try? daemon.quit()
            _ = daemon.waitForEnd()
            throw error
        }
        if daemon.result == nil { try daemon.quit() }
        try daemon.waitForEnd()?.get()
    }

    init() throws {
        place = try TemporaryFolder()
        _ = FileManager.default.createFile(
            atPath: "\(folder)/disk", contents: Data(count: 1 << 20))
    }

    private func start(_ arguments: [String]) throws {
        let monitor = [
            "--chardev", "socket,id=q,path=$/qmp,server=on,wait=off", "--monitor", "q",
        ]
        let options = try DaemonOptions(
            (monitor + arguments).map { $0.replacingOccurrences(of: "$", with: folder) })
        let isReady = DispatchSemaphore(value: 0)
        Thread.detachNewThread { [self] in
            let result: Result<Void, BlockError>
            do throws(BlockError) {
                try DaemonProgram.run(options) { () throws(BlockError) in isReady.signal() }
                result = .success(())
            } catch {
                result = .failure(error)
            }
            outcome.withLock { $0 = result }
            isReady.signal()
        }
        isReady.wait()
        try result?.get()
    }

    var result: Result<Void, BlockError>? { outcome.withLock { $0 } }

    func waitForEnd() -> Result<Void, BlockError>? {
        for _ in 0..<3000 {
            if let result { return result }
            usleep(10_000)
        }
        Issue.record("the daemon does not end")
        return nil
    }

    private func quit() throws {
        let client = try RawQMPClient(socketPath)
        try client.negotiate()
        try client.execute("quit")
    }

    func client() throws -> RawQMPClient {
        let client = try RawQMPClient(socketPath)
        try client.negotiate()
        return client
    }
}

/// A QMP client on a plain blocking socket.
final class RawQMPClient {
    struct Refused: Error {
        let kind: String
        let reason: String
    }
    private let descriptor: Int32
    private var buffer: [UInt8] = []
    private(set) var events: [JSONValue] = []

    init(_ path: String) throws {
        descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let size = socklen_t(MemoryLayout<sockaddr_un>.size)
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                connect(descriptor, $0, size)
            }
        }
        try #require(result == 0, "cannot connect to \(path)")
        var limit = timeval(tv_sec: 30, tv_usec: 0)
        setsockopt(
            descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit,
            socklen_t(MemoryLayout<timeval>.size))
    }

    deinit { close(descriptor) }

    func negotiate(enable: String = "") throws {
        #expect(try message()["QMP"] != nil)
        send("{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\(enable)]}}")
        #expect(try message()["return"] != nil)
    }

    func send(_ text: String) {
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let count = bytes.withUnsafeBytes {
                Foundation.send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            guard count > 0 else { return }
            bytes = bytes.dropFirst(count)
        }
    }

    func endInput() { shutdown(descriptor, Int32(SHUT_WR)) }

    /// - Returns: the next line; `nil` at the end.
    func line() -> String? {
        while true {
            if let end = buffer.firstIndex(of: 0x0a) {
                let line = String(decoding: buffer[..<end], as: UTF8.self)
                buffer.removeSubrange(...end)
                return line.trimmingCharacters(in: .whitespacesAndNewlines)
            }
            var chunk = [UInt8](repeating: 0, count: 65_536)
            let count = recv(descriptor, &chunk, chunk.count, 0)
            guard count > 0 else { return nil }
            buffer += chunk[..<count]
        }
    }

    func message() throws -> JSONValue {
        try JSONParser.parse(try #require(line(), "the daemon closed the connection"))
    }

    @discardableResult
    func execute(_ command: String, _ arguments: JSONValue = [:]) throws -> JSONValue {
        let request: JSONValue = ["execute": .string(command), "arguments": arguments]
        send(request.text() + "\n")
        while true {
            let message = try message()
            if message["event"] != nil {
                events.append(message)
            } else if let result = message["return"] {
                return result
            } else if case .string(let reason)? = message["error"]?["desc"],
                case .string(let kind)? = message["error"]?["class"]
            {
                throw Refused(kind: kind, reason: reason)
            }
        }
    }

    /// - Returns: why the command was refused.
    func refusal(_ command: String, _ arguments: JSONValue = [:]) throws -> String {
        do {
            let result = try execute(command, arguments)
            Issue.record("\(command) gave \(result.text())")
            return ""
        } catch let refused as Refused {
            return refused.reason
        }
    }

    func event() throws -> JSONValue {
        if !events.isEmpty { return events.removeFirst() }
        return try message()
    }
}
