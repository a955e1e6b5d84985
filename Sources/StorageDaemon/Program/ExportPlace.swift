import BlockCore
import BlockIO
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Where clients find an export: on which socket, and under which name.
public struct ExportPlace: Sendable {
    private static let portStandard: UInt16 = 10809

    /// The path of a Unix socket, which takes the place of a port and an address.
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

    /// The addresses to listen on, or to connect to: a name can stand for several. At least one.
    public func addresses(
        connecting: Bool = false, on thread: IOThread
    ) async throws(BlockError) -> [SocketAddress] {
        if let socket { return [.unix(path: socket)] }
        let host = (connecting ? connectedHost : bind) ?? "0.0.0.0"
        let port = portNumber
        let found = try await thread.offload { () throws(BlockError) in
            try SocketAddress.resolve(host: host, port: port, passive: !connecting)
        }
        guard !found.isEmpty else { throw BlockError(.notFound, "cannot resolve '\(host)'") }
        return found
    }

    /// Listens on all addresses that this machine has of those that a name stands for, on one port.
    ///
    /// - Throws: `busy` when one of them is in use.
    public func listen(on thread: IOThread) async throws(BlockError) -> [Listener] {
        var listeners: [Listener] = []
        var failure: BlockError?
        for address in try await addresses(on: thread) {
            // Left to the system for the first of them, it is the same for the others.
            let address = listeners.first?.address.port.map { address.with(port: $0) } ?? address
            if listeners.contains(where: { $0.address == address }) { continue }
            do throws(BlockError) {
                listeners.append(try await Listener.listening(on: address, thread: thread))
            } catch {
                guard [EADDRNOTAVAIL, EAFNOSUPPORT].contains(error.systemError) else {
                    for listener in listeners { listener.close() }
                    throw error
                }
                failure = failure ?? error
            }
        }
        if listeners.isEmpty, let failure { throw failure }
        return listeners
    }

    /// Does something with the first of the addresses that can be reached.
    ///
    /// - Throws: what went wrong there; when none can be reached, the failure to reach the last.
    public static func atFirstReachable<T: Sendable>(
        _ addresses: [SocketAddress], _ body: (SocketAddress) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        var failure = BlockError(.notFound, "there is no address to connect to")
        for address in addresses {
            do throws(BlockError) { return try await body(address) } catch {
                guard Self.unreachable.contains(error.systemError) else { throw error }
                failure = error
            }
        }
        throw failure
    }

    private static let unreachable = [
        ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ENETDOWN, ETIMEDOUT, EADDRNOTAVAIL, EAFNOSUPPORT,
    ]

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
            guard let bind, !bind.isEmpty, socket == nil else {
                option = address.option
                break
            }
            option = ["type": "inet", "host": .string(bind), "port": .string(String(port))]
        case .unix, .vsock: option = ["type": "other"]
        }
        return try NBDURI.text(address: option, export: exportName ?? "", needsTLS: usesTLS)
    }
}

extension SocketAddress {
    /// Of TCP.
    fileprivate var port: UInt16? {
        switch self {
        case .ipv4(_, let port), .ipv6(_, let port, _): port
        case .unix, .vsock: nil
        }
    }
}
