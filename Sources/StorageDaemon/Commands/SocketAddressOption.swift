import BlockCore
import BlockIO
import QMP

/// A `SocketAddress` as options give it: flat, or in the older form `{type, data}`.
struct SocketAddressOption {
    private let value: JSONValue
    private let daemon: StorageDaemon

    /// - Parameter daemon: knows descriptors by name.
    init(_ value: JSONValue, for daemon: StorageDaemon) throws(BlockError) {
        self.daemon = daemon
        guard let data = value["data"], case .object(var flat) = data, let type = value["type"]
        else {
            self.value = value
            return
        }
        flat["type"] = type
        self.value = .object(flat)
    }

    /// Connects to the address: to the first that answers, of several.
    func connect(on thread: IOThread) async throws(BlockError) -> Socket {
        let reader = try OptionReader(value, of: "the socket address")
        switch try reader.required("type") {
        case "unix": return try await Socket.connect(to: try unix(reader), on: thread)
        case "inet": return try await connectInternet(reader, thread)
        case "vsock": return try await Socket.connect(to: try vsock(reader), on: thread)
        case "fd":
            let handle = IOHandle(try descriptor(reader))
            try thread.system.adopt(handle)
            return Socket(handle, on: thread)
        case let other:
            throw BlockError(
                .unsupported, "cannot connect to a socket address of type '\(other)'",
                remedy: "use inet, unix, vsock or fd")
        }
    }

    private func connectInternet(
        _ reader: OptionReader, _ thread: IOThread
    ) async throws(BlockError) -> Socket {
        let internet = try InternetOptions(reader)
        try reader.finish()
        var failure = BlockError(.notFound, "host '\(internet.host)' has no address")
        for address in try await internet.resolve(passive: false, on: thread) {
            do throws(BlockError) {
                let socket = try await Socket.connect(to: address, on: thread)
                thread.system.setKeepAlive(socket.handle, internet.keepAlive)
                return socket
            } catch { failure = error }
        }
        throw failure
    }

    /// A descriptor: its number, or its name from `getfd` or a service manager.
    private func descriptor(_ reader: OptionReader) throws(BlockError) -> Int32 {
        let text = try reader.required("str")
        try reader.finish()
        if let number = Int32(text), number >= 0 { return number }
        if let passed = daemon.callerDescriptors?.take(named: text) { return passed }
        if let inherited = daemon.inheritedDescriptors.removeValue(forKey: text) {
            return inherited
        }
        throw BlockError(
            .notFound, "there is no descriptor named '\(text)'",
            remedy: "give its number, or pass it with getfd or from the service manager")
    }

    /// Listens on the address; a name can stand for several.
    func listen(on thread: IOThread) async throws(BlockError) -> [Listener] {
        let reader = try OptionReader(value, of: "the socket address")
        switch try reader.required("type") {
        case "unix":
            return [try await Listener.listening(on: try unix(reader), thread: thread)]
        case "inet": return try await listenInternet(reader, thread)
        case "vsock": return [try Listener(on: try vsock(reader), thread: thread)]
        case "fd":
            let handle = IOHandle(try descriptor(reader))
            return [try Listener(adopting: handle, thread: thread)]
        case let other:
            throw BlockError(
                .invalidArgument, "there is no socket address type '\(other)'",
                remedy: "use inet, unix, vsock or fd")
        }
    }

    private func unix(_ reader: OptionReader) throws(BlockError) -> SocketAddress {
        let path = try reader.required("path")
        let abstract = try reader.bool("abstract") ?? false
        _ = try reader.bool("tight")
        try reader.finish()
        return .unix(path: path, abstract: abstract)
    }

    private func vsock(_ reader: OptionReader) throws(BlockError) -> SocketAddress {
        let cid = try number(reader, "cid")
        let port = try number(reader, "port")
        try reader.finish()
        return .vsock(cid: cid, port: port)
    }

    private func number(_ reader: OptionReader, _ key: String) throws(BlockError) -> UInt32 {
        guard let value = try reader.int(key), let number = UInt32(exactly: value) else {
            throw BlockError(.invalidArgument, "'\(key)' is missing or out of bounds")
        }
        return number
    }

    private func listenInternet(
        _ reader: OptionReader, _ thread: IOThread
    ) async throws(BlockError) -> [Listener] {
        let internet = try InternetOptions(reader)
        let last = try reader.int("to") ?? Int(internet.port)
        guard let end = UInt16(exactly: last), end >= internet.port else {
            throw BlockError(.invalidArgument, "'to' is out of bounds: \(last)")
        }
        try reader.finish()
        let addresses = try await internet.resolve(passive: true, on: thread)
        let (host, port) = (internet.host, internet.port)
        var failure = BlockError(.notFound, "host '\(host)' has no address to listen on")
        for candidate in port...end {
            var listeners: [Listener] = []
            do throws(BlockError) {
                for address in addresses {
                    let address = address.with(port: candidate)
                    // With several ports to choose from, the next one is there at once.
                    let listener =
                        port == end
                        ? try await Listener.listening(on: address, thread: thread)
                        : try Listener(on: address, thread: thread)
                    listener.keepAlive = internet.keepAlive
                    listeners.append(listener)
                }
                if !listeners.isEmpty { return listeners }
            } catch {
                for listener in listeners { listener.close() }
                failure = error
            }
        }
        throw failure
    }
}

/// The options of an `inet` address that listening and connecting share.
private struct InternetOptions {
    let host: String
    let port: UInt16
    let keepAlive: KeepAlive
    private let isNumeric: Bool
    private let ipv4: Bool?
    private let ipv6: Bool?

    init(_ reader: OptionReader) throws(BlockError) {
        host = try reader.required("host")
        guard let number = try reader.int("port"), let port = UInt16(exactly: number) else {
            throw BlockError(.invalidArgument, "'port' is missing or out of bounds")
        }
        self.port = port
        isNumeric = try reader.bool("numeric") ?? false
        ipv4 = try reader.bool("ipv4")
        ipv6 = try reader.bool("ipv6")
        var keepAlive = KeepAlive()
        keepAlive.isOn = try reader.bool("keep-alive") ?? true
        keepAlive.idleSeconds = try Self.count(reader, "keep-alive-idle")
        keepAlive.intervalSeconds = try Self.count(reader, "keep-alive-interval")
        keepAlive.probeCount = try Self.count(reader, "keep-alive-count")
        self.keepAlive = keepAlive
        if try reader.bool("mptcp") == true {
            throw BlockError(.unsupported, "multipath TCP is not supported")
        }
    }

    private static func count(
        _ reader: OptionReader, _ key: String
    ) throws(BlockError) -> Int32? {
        guard let value = try reader.int(key), value != 0 else { return nil }
        guard let number = Int32(exactly: value), number > 0, number <= 32767 else {
            throw BlockError(.invalidArgument, "'\(key)' is out of bounds: \(value)")
        }
        return number
    }

    /// - Throws: `notFound` for a name where only numbers are wanted.
    func resolve(
        passive: Bool, on thread: IOThread
    ) async throws(BlockError) -> [SocketAddress] {
        let options = self
        return try await thread.offload { () throws(BlockError) in
            try SocketAddress.resolve(
                host: options.host, port: options.port, passive: passive,
                ipv4: options.ipv4 ?? (options.ipv6 != true),
                ipv6: options.ipv6 ?? (options.ipv4 != true), numeric: options.isNumeric)
        }
    }
}

extension SocketAddress {
    /// The same address with another TCP port.
    func with(port: UInt16) -> SocketAddress {
        switch self {
        case .ipv4(let address, _): .ipv4(address: address, port: port)
        case .ipv6(let address, _, let scope): .ipv6(address: address, port: port, scope: scope)
        case .unix, .vsock: self
        }
    }
}

extension SocketAddress {
    /// The address as options give it.
    var option: JSONValue {
        switch self {
        case .unix(let path, let abstract):
            ["type": "unix", "path": .string(path), "abstract": .bool(abstract)]
        case .ipv4(_, let port), .ipv6(_, let port, _):
            ["type": "inet", "host": .string(host), "port": .string(String(port))]
        case .vsock(let cid, let port):
            ["type": "vsock", "cid": .string(String(cid)), "port": .string(String(port))]
        }
    }

    /// The number of the host, without the port.
    private var host: String {
        let text = description
        guard let colon = text.lastIndex(of: ":") else { return text }
        return String(text[..<colon].filter { $0 != "[" && $0 != "]" })
    }
}
