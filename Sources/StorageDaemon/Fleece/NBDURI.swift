import BlockCore
import QMP

/// NBD addresses as clients take them (the NBD URI specification).
public enum NBDURI {
    /// - Parameters:
    ///   - address: as `x-query-nbd-server` tells it.
    ///   - needsTLS: the server takes no clients without.
    public static func text(
        address: JSONValue, export: String, needsTLS: Bool = false
    ) throws(BlockError) -> String {
        let name = escape(export, keeping: "")
        let scheme = needsTLS ? "nbds" : "nbd"
        switch (address["type"], address["path"], address["host"], address["port"]) {
        case ("unix", .string(let path)?, _, _):
            return "\(scheme)+unix:///\(name)?socket=\(escape(path, keeping: "/"))"
        case ("inet", _, .string(let host)?, .string(let port)?):
            let reachable = host == "0.0.0.0" ? "127.0.0.1" : host == "::" ? "::1" : host
            let place = reachable.contains(":") ? "[\(reachable)]" : reachable
            return "\(scheme)://\(place):\(port)/\(name)"
        default:
            throw BlockError(.unsupported, "the NBD server's address cannot be given as a URI")
        }
    }

    private static func escape(_ text: String, keeping kept: String) -> String {
        text.utf8.map { byte -> String in
            let character = Character(Unicode.Scalar(byte))
            let plain = character.isASCII && (character.isLetter || character.isNumber)
            if plain || "-._~".contains(character) || kept.contains(character) {
                return String(character)
            }
            let digits = String(byte, radix: 16, uppercase: true)
            return "%" + (digits.count < 2 ? "0" : "") + digits
        }.joined()
    }
}

extension FleeceSession {
    /// Stops an NBD server that was started for a view, unless others have exports there by now.
    public static func stopServer(_ executor: any QMPExecutor) async throws(BlockError) {
        guard case .array(let exports) = try await executor.execute("query-block-exports", [:]),
            exports.allSatisfy({ $0["shutting-down"] == true })
        else { return }
        _ = try await executor.execute("nbd-server-stop", [:])
    }

    /// Where clients read the frozen view; starts an NBD server on `socket` when none runs.
    ///
    /// - Returns: the URI, and whether the server was started for it.
    public static func address(
        of export: String, socket: String?, executor: any QMPExecutor
    ) async throws(BlockError) -> (uri: String, started: Bool) {
        var server = try await executor.execute("x-query-nbd-server", [:])
        var started = false
        if case .null = server {
            guard let socket else {
                throw BlockError(
                    .invalidArgument, "the daemon runs no NBD server",
                    remedy: "name a socket for one with --nbd-socket")
            }
            _ = try await executor.execute(
                "nbd-server-start",
                ["addr": ["type": "unix", "data": ["path": .string(socket)]]])
            started = true
            server = try await executor.execute("x-query-nbd-server", [:])
        }
        guard case .array(let addresses)? = server["addresses"], let first = addresses.first else {
            throw BlockError(.notFound, "the NBD server listens nowhere")
        }
        let needsTLS = server["tls-creds"] != nil
        return (
            try NBDURI.text(address: first, export: export, needsTLS: needsTLS), started
        )
    }
}
