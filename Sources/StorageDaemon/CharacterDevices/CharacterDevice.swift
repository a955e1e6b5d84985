import BlockCore
import BlockIO
import QMP

/// A way for bytes in and out, as `--chardev` and `chardev-add` make it; a monitor may use it. Confined
/// to the daemon's thread.
protocol CharacterDevice: AnyObject, Sendable {
    /// As QEMU's object model names its type: `chardev-socket`.
    var typeName: String { get }
    /// Where its bytes come from and go to, for queries.
    var filename: String { get }
    /// A monitor uses it.
    var isUsed: Bool { get }

    /// Has a monitor answer on it, from now on.
    func attach(to monitors: MonitorServer, isPretty: Bool) throws(BlockError)
    /// Where that was asked for: returns when the first client is there.
    func waitForClient() async throws(BlockError)
    /// Ends such a wait.
    func stopWaiting()
    func close()
}

extension CharacterDevice {
    func waitForClient() async throws(BlockError) {}
    func stopWaiting() {}

    /// - Throws: `busy` where a monitor uses it.
    func checkUnused() throws(BlockError) {
        guard !isUsed else {
            throw BlockError(.busy, "another monitor uses the character device")
        }
    }
}

/// The kinds of devices there are.
enum CharacterDevices {
    static let backends = [
        "file", "memory", "null", "pipe", "pty", "ringbuf", "serial", "socket", "stdio", "udp",
    ]

    /// What each takes beside its identifier, as a command line spells it.
    static let options: [String: [String]] = [
        "file": ["path=<string>", "append=<bool>", "input-path=<string>"],
        "memory": ["size=<size>"], "null": [], "pipe": ["path=<string>"], "pty": [],
        "ringbuf": ["size=<size>"], "serial": ["path=<string>"],
        "socket": [
            "path=<string>", "abstract=<bool>", "host=<string>", "port=<int>", "to=<int>",
            "ipv4=<bool>", "ipv6=<bool>", "keep-alive=<bool>", "numeric=<bool>", "cid=<int>",
            "fd=<string>", "server=<bool>", "wait=<bool>",
        ], "stdio": ["signal=<bool>"],
        "udp": [
            "host=<string>", "port=<int>", "localaddr=<string>", "localport=<int>", "ipv4=<bool>",
            "ipv6=<bool>",
        ],
    ]

    /// Makes a device.
    ///
    /// - Parameter options: `backend` and the backend's own, `id` read already.
    static func make(
        _ options: OptionReader, for daemon: StorageDaemon
    ) async throws(BlockError) -> any CharacterDevice {
        let backend = try options.required("backend")
        switch backend {
        case "socket": return try await SocketDevice(options, for: daemon)
        case "ringbuf", "memory": return try RingBuffer(options, typeName: "chardev-\(backend)")
        case "null":
            try options.finish()
            return NullDevice()
        case "stdio": return try StandardStreams(options, on: daemon.thread)
        case "file": return try DescriptorDevice.file(options, on: daemon.thread)
        case "pipe": return try DescriptorDevice.pipe(options, on: daemon.thread)
        case "pty": return try DescriptorDevice.terminal(options, on: daemon.thread)
        case "serial", "tty": return try DescriptorDevice.serial(options, on: daemon.thread)
        case "udp": return try await DescriptorDevice.datagrams(options, on: daemon.thread)
        case "mux":
            throw BlockError(
                .unsupported, "a monitor has its character device to itself: there is no 'mux'",
                remedy: "give each monitor a device")
        case "parallel", "parport":
            throw BlockError(
                .unsupported, "parallel ports are no character devices here",
                remedy: "use one of \(backends.joined(separator: ", "))")
        default:
            throw BlockError(
                .unsupported, "there is no character device backend '\(backend)'",
                remedy: "use one of \(backends.joined(separator: ", "))")
        }
    }
}

/// Takes everything, and gives nothing.
final class NullDevice: CharacterDevice, @unchecked Sendable {
    let typeName = "chardev-null"
    let filename = "null"
    let isUsed = false

    func attach(to monitors: MonitorServer, isPretty: Bool) throws(BlockError) {
        throw BlockError(
            .unsupported, "nobody could ask a monitor anything on a 'null' device",
            remedy: "use socket or stdio")
    }

    func close() {}
}
