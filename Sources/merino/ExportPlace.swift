import ArgumentParser
import BlockCore
import BlockIO
import StorageDaemon

/// Where clients find an export: on which socket, and under which name.
struct ExportPlace: ParsableArguments {
    private static let portStandard: UInt16 = 10809

    @Option(
        name: [.customShort("k", allowingJoined: true), .long],
        help: "Listen on this Unix socket.")
    var socket: String?
    @Option(
        name: [.customShort("p", allowingJoined: true), .long], help: "Listen on this TCP port.")
    var port: UInt16?
    @Option(
        name: [.customShort("b", allowingJoined: true), .long], help: "Listen on this address.")
    var bind: String?
    @Option(
        name: [.customShort("x", allowingJoined: true), .customLong("export-name")],
        help: "The export's name.")
    var exportName = ""

    var hasSocketOrAddress: Bool { socket != nil || hasAddress }
    var hasAddress: Bool { port != nil || bind != nil }

    /// Where a client connects to; a certificate is for the name that was connected to.
    var connectedHost: String? {
        socket == nil ? bind ?? "localhost" : nil
    }

    /// The address to listen on, or to connect to.
    func address(connecting: Bool = false) throws(BlockError) -> SocketAddress {
        if let socket { return .unix(path: socket) }
        let host = (connecting ? connectedHost : bind) ?? "0.0.0.0"
        guard
            let first = try SocketAddress.resolve(
                host: host, port: port ?? Self.portStandard, passive: !connecting
            ).first
        else { throw BlockError(.notFound, "cannot resolve '\(host)'") }
        return first
    }

    func uri() throws(BlockError) -> String {
        if let socket {
            return try NBDURI.text(
                address: ["type": "unix", "path": .string(socket)], export: exportName)
        }
        return try NBDURI.text(
            address: [
                "type": "inet", "host": .string(bind ?? "0.0.0.0"),
                "port": .string(String(port ?? Self.portStandard)),
            ], export: exportName)
    }
}
