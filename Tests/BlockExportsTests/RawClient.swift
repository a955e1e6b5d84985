import Foundation
import Testing

/// A client that sends any bytes, over a blocking socket.
final class RawClient {
    let descriptor: Int32
    private var isOpen = true

    init(unix path: String) throws {
        descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8.prefix(100)) }
        try connect(&address)
    }

    init(port: UInt16) throws {
        descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        try connect(&address)
    }

    deinit { close() }

    private func connect<T>(_ address: inout T) throws {
        // So that a server that says nothing fails the test instead of holding it.
        var limit = timeval(tv_sec: 30, tv_usec: 0)
        setsockopt(
            descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
        setsockopt(
            descriptor, SOL_SOCKET, SO_SNDTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                Glibc.connect(descriptor, $0, socklen_t(MemoryLayout<T>.size))
            }
        }
        try #require(result == 0, "cannot connect: \(errno)")
    }

    /// Sends all of `bytes`.
    /// - Returns: `false` when the server is gone.
    @discardableResult
    func send(_ bytes: [UInt8]) -> Bool {
        var done = 0
        while done < bytes.count {
            let sent = bytes.withUnsafeBytes {
                Glibc.send(
                    descriptor, $0.baseAddress.map { $0 + done }, $0.count - done,
                    Int32(MSG_NOSIGNAL))
            }
            if sent <= 0 { return false }
            done += sent
        }
        return true
    }

    /// Receives `count` bytes; fewer when the server closed the connection before.
    func receive(_ count: Int) -> [UInt8] {
        var result: [UInt8] = []
        var part = [UInt8](repeating: 0, count: min(count, 1 << 20))
        while result.count < count {
            let got = recv(descriptor, &part, min(part.count, count - result.count), 0)
            if got < 0, errno != ECONNRESET {
                Issue.record("nothing came: errno \(errno)")
                return result
            }
            if got <= 0 { return result }
            result += part[..<got]
        }
        return result
    }

    /// Whether the server closes the connection, whatever it sends before.
    func isClosed() -> Bool {
        while true {
            let before = receive(1 << 16)
            if before.count < 1 << 16 { return true }
        }
    }

    func finishSending() {
        shutdown(descriptor, Int32(SHUT_WR))
    }

    func close() {
        guard isOpen else { return }
        isOpen = false
        Glibc.close(descriptor)
    }

    /// Closes so that the server gets a reset.
    func reset() {
        var off = linger(l_onoff: 1, l_linger: 0)
        setsockopt(
            descriptor, SOL_SOCKET, SO_LINGER, &off, socklen_t(MemoryLayout<linger>.size))
        close()
    }

    // MARK: NBD

    static func bigEndian(_ value: some FixedWidthInteger) -> [UInt8] {
        withUnsafeBytes(of: value.bigEndian) { Array($0) }
    }

    static let flags: [UInt8] = [0, 0, 0, 3]

    static func option(_ type: UInt32, _ data: [UInt8] = []) -> [UInt8] {
        Array("IHAVEOPT".utf8) + bigEndian(type) + bigEndian(UInt32(data.count)) + data
    }

    static func go(_ name: String) -> [UInt8] {
        option(7, bigEndian(UInt32(name.utf8.count)) + Array(name.utf8) + [0, 0])
    }

    static func contexts(_ name: String, _ queries: [String]) -> [UInt8] {
        let head = bigEndian(UInt32(name.utf8.count)) + Array(name.utf8)
        return option(
            10,
            head + bigEndian(UInt32(queries.count))
                + queries.flatMap { bigEndian(UInt32($0.utf8.count)) + Array($0.utf8) })
    }

    static func request(
        _ type: UInt16, _ offset: UInt64, _ length: UInt32, cookie: UInt64 = 1, flags: UInt16 = 0
    ) -> [UInt8] {
        bigEndian(UInt32(0x2560_9513)) + bigEndian(flags) + bigEndian(type) + bigEndian(cookie)
            + bigEndian(offset) + bigEndian(length)
    }

    static func extendedRequest(
        _ type: UInt16, _ offset: UInt64, _ length: UInt64, cookie: UInt64 = 1, flags: UInt16 = 0
    ) -> [UInt8] {
        bigEndian(UInt32(0x21e4_1c71)) + bigEndian(flags) + bigEndian(type) + bigEndian(cookie)
            + bigEndian(offset) + bigEndian(length)
    }

    /// Reads the reply to an option.
    func optionReply() -> (type: UInt32, data: [UInt8])? {
        let header = receive(20)
        guard header.count == 20 else { return nil }
        let type = header[12..<16].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        let count = header[16..<20].reduce(0) { $0 << 8 | Int($1) }
        return (type, receive(count))
    }

    /// Reads replies to one option up to the one that ends them; its type.
    func endOfReplies() -> UInt32? {
        while let reply = optionReply() {
            if reply.type == 1 || reply.type >= 0x8000_0000 { return reply.type }
        }
        return nil
    }

    /// Goes through a handshake to the requests of `name`, with simple replies unless options say
    /// otherwise.
    func enter(_ name: String = "disk", options: [[UInt8]] = []) {
        #expect(receive(18).count == 18)
        send(Self.flags)
        for option in options {
            send(option)
            #expect(endOfReplies() == 1)
        }
        send(Self.go(name))
        #expect(endOfReplies() == 1)
    }

    /// Reads a reply of the extended form.
    func extendedReply() -> (flags: UInt16, type: UInt16, cookie: UInt64, data: [UInt8])? {
        let header = receive(32)
        guard header.count == 32, header.starts(with: [0x6e, 0x8a, 0x27, 0x8c]) else { return nil }
        func number(_ range: Range<Int>) -> UInt64 {
            header[range].reduce(0) { $0 << 8 | UInt64($1) }
        }
        return (
            UInt16(number(4..<6)), UInt16(number(6..<8)), number(8..<16),
            receive(Int(number(24..<32)))
        )
    }
}
