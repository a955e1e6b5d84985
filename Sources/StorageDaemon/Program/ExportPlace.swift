import BlockCore
import BlockIO
import QMP

/// Where clients find an export: on which socket, and under which name.
public struct ExportPlace: Sendable {
    private static let portStandard: UInt16 = 10809

    /// The path of a Unix socket.
    public var socket: String?
    /// A TCP port, from 0 to 65535.
    public var port: Int?
    /// The address that belongs to the port.
    public var bind: String?
    /// nil: the nameless export.
    public var exportName: String?

    public init() {}

    public var hasSocketOrAddress: Bool { socket != nil || hasAddress }
    public var hasAddress: Bool { port != nil || bind != nil }
    private var portNumber: UInt16 { port.map { UInt16(clamping: $0) } ?? Self.portStandard }

    /// Where a client connects to; a certificate is for the name that was connected to.
    public var connectedHost: String? {
        socket == nil ? bind ?? "localhost" : nil
    }

    /// The address to listen on, or to connect to.
    public func address(connecting: Bool = false) throws(BlockError) -> SocketAddress {
        if let socket { return .unix(path: socket) }
        let host = (connecting ? connectedHost : bind) ?? "0.0.0.0"
        guard
            let first = try SocketAddress.resolve(
                host: host, port: portNumber, passive: !connecting
            ).first
        else { throw BlockError(.notFound, "cannot resolve '\(host)'") }
        return first
    }

    /// The export's NBD URI, for clients on this machine wherever they are.
    ///
    /// - Parameters:
    ///   - address: where a server listens for them.
    ///   - usesTLS: they have to use it.
    public func uri(
        at address: SocketAddress, usesTLS: Bool = false
    ) throws(BlockError) -> String {
        let option: JSONValue
        switch address {
        case .unix(let path, abstract: false):
            option = ["type": "unix", "path": .string(WorkingFolder.absolute(path))]
        case .ipv4(_, let port), .ipv6(_, let port, _):
            // A certificate is for the name that was given. The port may have been left to the system.
            guard let bind, !bind.isEmpty else {
                option = address.option
                break
            }
            option = ["type": "inet", "host": .string(bind), "port": .string(String(port))]
        case .unix, .vsock: option = ["type": "other"]
        }
        return try NBDURI.text(address: option, export: exportName ?? "", needsTLS: usesTLS)
    }
}
