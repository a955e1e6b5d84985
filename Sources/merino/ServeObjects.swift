import BlockCore
import BlockTLS
import QMP

/// The objects that `--object` makes for `serve`: TLS credentials, who may come in, and secrets.
struct ServeObjects {
    private var credentials: [String: TLSCredentials] = [:]
    /// The one name each lets in: a certificate's distinguished name, or a key's user.
    private var identities: [String: String] = [:]
    /// The texts of secrets, which the image's options name.
    private(set) var secrets: [String] = []

    /// - Parameter texts: `type,id=…,key=value…`, or JSON with `qom-type`.
    init(_ texts: [String]) throws(BlockError) {
        for text in texts {
            let options = try OptionReader(
                try KeyValue.parse(text, impliedKey: "qom-type"), of: "--object \(text)")
            let type = try Self.required("qom-type", options)
            if type == "secret" {
                secrets.append(text)
                continue
            }
            let identifier = try Self.required("id", options)
            guard credentials[identifier] == nil, identities[identifier] == nil else {
                throw BlockError(.alreadyExists, "there are two objects '\(identifier)'")
            }
            switch type {
            case "tls-creds-x509", "tls-creds-psk":
                credentials[identifier] = try Self.credentials(type, options)
            case "authz-simple":
                identities[identifier] = try Self.required("identity", options)
            default:
                throw BlockError(
                    .unsupported, "--object \(text): this type is not supported here",
                    remedy: "use tls-creds-x509, tls-creds-psk, authz-simple or secret")
            }
            try options.finish()
        }
    }

    private static func credentials(
        _ type: String, _ options: OptionReader
    ) throws(BlockError) -> TLSCredentials {
        let endpoint = try options.enumeration("endpoint", as: TLSEndpoint.self) ?? .client
        guard endpoint == .server else {
            throw BlockError(
                .invalidArgument, "TLS credentials of a server need endpoint=server")
        }
        let directory = try required("dir", options)
        let priority = try options.string("priority") ?? TLSCredentials.defaultPriority
        let verifiesPeer = try options.bool("verify-peer") ?? true
        if type == "tls-creds-psk" {
            return try .psk(directory: directory, endpoint: endpoint, priority: priority)
        }
        return try .x509(
            directory: directory, endpoint: endpoint, verifiesPeer: verifiesPeer,
            priority: priority)
    }

    private static func required(
        _ key: String, _ options: OptionReader
    ) throws(BlockError) -> String {
        guard let value = try options.string(key) else {
            throw BlockError(.invalidArgument, "\(options.subject): '\(key)' is missing")
        }
        return value
    }

    /// The credentials that `--tls-creds` names.
    func credentials(named name: String) throws(BlockError) -> TLSCredentials {
        guard let found = credentials[name] else {
            throw BlockError(
                .notFound, "there are no TLS credentials '\(name)'",
                remedy: "add --object tls-creds-x509,id=\(name),endpoint=server,dir=…")
        }
        return found
    }

    /// Who `--tls-authz` lets in.
    func authorization(named name: String) throws(BlockError) -> @Sendable (String) -> Bool {
        guard let identity = identities[name] else {
            throw BlockError(
                .notFound, "there is no authorization '\(name)'",
                remedy: "add --object authz-simple,id=\(name),identity=…")
        }
        return { $0 == identity }
    }
}
