import BlockCore
import BlockIO
import QMP

/// A socket, that listens for clients or is connected.
final class SocketDevice: CharacterDevice, @unchecked Sendable {
    let typeName = "chardev-socket"
    private var listeners: [Listener] = []
    /// Clients that came before there was a monitor.
    private var sockets: [Socket] = []
    private var waits = false
    private(set) var isUsed = false
    private let isServer: Bool
    private var name = ""

    /// Listens, or with `server=off` connects.
    ///
    /// - Parameter reader: the options of the device: flat ones of the command line, or `addr`.
    init(_ reader: OptionReader, for daemon: StorageDaemon) async throws(BlockError) {
        let isFlat = try reader.value("addr") == nil
        isServer = try reader.bool("server") ?? !isFlat
        let waits = try reader.bool("wait")
        // Each client gets its packets at once: that is what both ask for.
        for key in ["delay", "nodelay"] { _ = try reader.bool(key) }
        try Self.refuseOthers(reader)
        let address = try Self.address(reader, daemon)
        try reader.finish()
        if isServer {
            self.waits = waits ?? isFlat
            listeners = try await address.listen(on: daemon.thread)
            name = listeners.first.map { Self.describe($0.address) + ",server=on" } ?? ""
        } else {
            guard waits == nil else {
                throw BlockError(.invalidArgument, "option 'wait' needs server=on")
            }
            let socket = try await address.connect(on: daemon.thread)
            sockets = [socket]
            name = "connected"
        }
    }

    /// What a socket could do besides carrying bytes, and does not here.
    private static func refuseOthers(_ reader: OptionReader) throws(BlockError) {
        for key in ["telnet", "tn3270", "websocket"] where try reader.bool(key) == true {
            throw BlockError(.unsupported, "character devices do not speak '\(key)'")
        }
        for key in ["reconnect", "reconnect-ms"] {
            if let time = try reader.int(key), time != 0 {
                throw BlockError(
                    .unsupported, "a character device does not connect again by itself")
            }
        }
        for key in ["tls-creds", "tls-authz"] where try reader.string(key) != nil {
            throw BlockError(
                .unsupported, "character devices have no TLS",
                remedy: "use a Unix socket, or forward a port through ssh")
        }
    }

    /// The older flat options, as an address.
    private static func address(
        _ reader: OptionReader, _ daemon: StorageDaemon
    ) throws(BlockError) -> SocketAddressOption {
        if let address = try reader.value("addr") {
            return try SocketAddressOption(address, for: daemon)
        }
        var address: JSONObject = [:]
        for key in [
            "path", "abstract", "tight", "host", "port", "to", "ipv4", "ipv6", "keep-alive",
            "numeric", "fd", "cid",
        ] {
            if let value = try reader.value(key) { address[key] = value }
        }
        let kinds = ["path", "host", "port", "fd", "cid"].filter { address[$0] != nil }
        switch kinds {
        case ["path"]: address["type"] = "unix"
        case ["host", "port"]: address["type"] = "inet"
        case ["port"]:
            address["type"] = "inet"
            address["host"] = ""
        case ["port", "cid"]: address["type"] = "vsock"
        case ["fd"]:
            address["type"] = "fd"
            address["str"] = address["fd"]
            address["fd"] = nil
        default:
            throw BlockError(
                .invalidArgument, "a socket needs 'path', 'host' and 'port', or 'fd'")
        }
        return try SocketAddressOption(.object(address), for: daemon)
    }

    private static func describe(_ address: SocketAddress) -> String {
        address.isTCP ? "tcp:\(address)" : "\(address)"
    }

    var filename: String { isUsed ? name : "disconnected:\(name)" }

    /// With `wait=on`: the first client.
    func waitForClient() async throws(BlockError) {
        guard waits, let listener = listeners.first else { return }
        guard let socket = try await listener.accept() else {
            throw BlockError(.cancelled, "nobody connected to \(listener.address)")
        }
        sockets.append(socket)
        waits = false
    }

    func stopWaiting() {
        if waits { close() }
    }

    func attach(to monitors: MonitorServer, isPretty: Bool) throws(BlockError) {
        try checkUnused()
        isUsed = true
        for socket in sockets { monitors.serve(socket, isPretty: isPretty) }
        sockets = []
        for listener in listeners { monitors.listen(on: listener, isPretty: isPretty) }
    }

    func close() {
        for listener in listeners { listener.close() }
        for socket in sockets { socket.close() }
        sockets = []
    }
}
