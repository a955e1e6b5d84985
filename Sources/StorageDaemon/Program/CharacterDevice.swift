import BlockCore
import BlockIO
import QMP

/// A socket of `--chardev`, for a monitor. Confined to its thread.
final class CharacterDevice: @unchecked Sendable {
    private var listeners: [Listener] = []
    /// Clients that came before there was a monitor.
    private var sockets: [Socket] = []
    private var waits = false
    private var isUsed = false
    private let thread: IOThread

    /// Listens, or with `server=off` connects.
    ///
    /// - Parameter reader: the options of the device, `id` read already.
    init(_ reader: OptionReader, on thread: IOThread) async throws(BlockError) {
        self.thread = thread
        let backend = try reader.required("backend")
        guard backend == "socket" else {
            throw BlockError(
                .unsupported, "there is no character device backend '\(backend)'",
                remedy: "use socket")
        }
        let isServer = try reader.bool("server") ?? false
        let waits = try reader.bool("wait")
        // Each client gets its packets at once: that is what both ask for.
        for key in ["delay", "nodelay"] { _ = try reader.bool(key) }
        let address = try Self.address(reader)
        try reader.finish()
        if isServer {
            self.waits = waits ?? true
            listeners = try await address.listen(on: thread)
        } else {
            guard waits == nil else {
                throw BlockError(.invalidArgument, "option 'wait' needs server=on")
            }
            sockets = [try await address.connect(on: thread)]
        }
    }

    /// The older flat options, as an address.
    private static func address(_ reader: OptionReader) throws(BlockError) -> SocketAddressOption {
        var address: JSONObject = [:]
        for key in [
            "path", "abstract", "tight", "host", "port", "to", "ipv4", "ipv6", "keep-alive", "fd",
        ] {
            if let value = try reader.value(key) { address[key] = value }
        }
        let kinds = ["path", "host", "port", "fd"].filter { address[$0] != nil }
        switch kinds {
        case ["path"]: address["type"] = "unix"
        case ["host", "port"]: address["type"] = "inet"
        case ["port"]:
            address["type"] = "inet"
            address["host"] = ""
        case ["fd"]:
            address["type"] = "fd"
            address["str"] = address["fd"]
            address["fd"] = nil
        default:
            throw BlockError(
                .invalidArgument, "a socket needs 'path', 'host' and 'port', or 'fd'")
        }
        return try SocketAddressOption(.object(address))
    }

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
        guard !isUsed else {
            throw BlockError(.busy, "another monitor uses the character device")
        }
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
