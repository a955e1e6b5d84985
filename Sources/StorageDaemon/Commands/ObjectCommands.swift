import BlockCore
import BlockFilters
import BlockGraph
import BlockTLS
import QMP

/// An object of `object-add`: other commands refer to it by its identifier.
enum DaemonObject {
    enum Kind: String, CaseIterable {
        case secret
        case certificates = "tls-creds-x509"
        case keys = "tls-creds-psk"
        case authorization = "authz-simple"
        case thread = "iothread"
        case throttleGroup = "throttle-group"
    }

    case secret([UInt8])
    case credentials(TLSCredentials)
    /// Lets in whoever is called exactly so.
    case authorization(identity: String)
    /// All nodes run on the daemon's own thread: the object is there to be named.
    case thread
    /// Nodes find it in the graph's objects.
    case throttleGroup(ThrottleGroup)
}

extension StorageDaemon {
    /// `object-add`.
    func objectAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "object-add")
        guard let kind = try reader.enumeration("qom-type", as: DaemonObject.Kind.self) else {
            throw BlockError(.invalidArgument, "object-add: parameter 'qom-type' is missing")
        }
        let identifier = try reader.required("id")
        reader.subject = "object '\(identifier)' (\(kind.rawValue))"
        guard !identifier.isEmpty, identifier.utf8.count <= Limits.nameLengthMax else {
            throw BlockError(.invalidArgument, "an object needs an identifier")
        }
        guard objects[identifier] == nil else {
            throw BlockError(.alreadyExists, "there is an object '\(identifier)' already")
        }
        objects[identifier] = try await makeObject(kind, reader)
        return [:]
    }

    /// `object-del`. Who uses it already goes on doing so; but a throttle group goes after its nodes.
    func objectDel(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "object-del")
        let identifier = try reader.required("id")
        try reader.finish()
        guard objects[identifier] != nil else {
            throw BlockError(.notFound, "there is no object '\(identifier)'")
        }
        try graph.removeObject(identifier)
        objects[identifier] = nil
        return [:]
    }

    private func makeObject(
        _ kind: DaemonObject.Kind, _ reader: OptionReader
    ) async throws(BlockError) -> DaemonObject {
        switch kind {
        case .secret:
            let secret = try await GraphSecret.read(reader, on: thread)
            try reader.finish()
            try graph.addObject(secret, as: try reader.required("id"))
            return .secret(secret.bytes)
        case .certificates: return .credentials(try await certificates(reader))
        case .keys: return .credentials(try await keys(reader))
        case .authorization:
            let identity = try reader.required("identity")
            try reader.finish()
            return .authorization(identity: identity)
        case .thread:
            for key in [
                "poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min",
                "thread-pool-max",
            ] { _ = try reader.int(key) }
            try reader.finish()
            return .thread
        case .throttleGroup:
            let limits = try ThrottleGroup.properties(reader)
            let group = try ThrottleGroup(try reader.required("id"), limits, on: thread)
            try graph.addObject(group, as: group.identifier)
            return .throttleGroup(group)
        }
    }

    // MARK: TLS

    private func certificates(_ reader: OptionReader) async throws(BlockError) -> TLSCredentials {
        let directory = try reader.string("dir") ?? "/etc/pki/qemu"
        let endpoint = try reader.enumeration("endpoint", as: TLSEndpoint.self) ?? .client
        let verifiesPeer = try reader.bool("verify-peer") ?? true
        let priority = try reader.string("priority") ?? TLSCredentials.defaultPriority
        // Credentials are checked whenever they are loaded.
        _ = try reader.bool("sanity-check")
        var password: String?
        if let identifier = try reader.string("passwordid") {
            guard case .secret(let bytes)? = objects[identifier] else {
                throw BlockError(.notFound, "there is no secret '\(identifier)'")
            }
            password = String(validating: bytes, as: UTF8.self)
        }
        try reader.finish()
        let keyPassword = password
        return try await thread.offload { () throws(BlockError) in
            try TLSCredentials.x509(
                directory: directory, endpoint: endpoint, verifiesPeer: verifiesPeer,
                priority: priority, keyPassword: keyPassword)
        }
    }

    private func keys(_ reader: OptionReader) async throws(BlockError) -> TLSCredentials {
        let directory = try reader.string("dir") ?? "/etc/pki/qemu"
        let endpoint = try reader.enumeration("endpoint", as: TLSEndpoint.self) ?? .client
        let username = try reader.string("username") ?? "qemu"
        let priority = try reader.string("priority") ?? TLSCredentials.defaultPriority
        // Keys shared in advance prove the peer by themselves.
        _ = try reader.bool("verify-peer")
        try reader.finish()
        return try await thread.offload { () throws(BlockError) in
            try TLSCredentials.psk(
                directory: directory, endpoint: endpoint, username: username, priority: priority)
        }
    }

    // MARK: Users of objects

    /// - Throws: when there are none of that name, or they are a client's.
    func serverCredentials(_ identifier: String) throws(BlockError) -> TLSCredentials {
        guard case .credentials(let credentials)? = objects[identifier] else {
            throw BlockError(
                .notFound, "there are no TLS credentials '\(identifier)'",
                remedy: "object-add makes them")
        }
        guard credentials.endpoint == .server else {
            throw BlockError(
                .invalidArgument, "the TLS credentials '\(identifier)' are a client's",
                remedy: "add them with endpoint=server")
        }
        return credentials
    }

    func authorization(
        _ identifier: String
    ) throws(BlockError) -> @Sendable (String) -> Bool {
        guard case .authorization(let identity)? = objects[identifier] else {
            throw BlockError(
                .notFound, "there is no authorization object '\(identifier)'",
                remedy: "object-add with qom-type=authz-simple makes one")
        }
        return { $0 == identity }
    }

    func requireThread(_ identifier: String) throws(BlockError) {
        guard case .thread? = objects[identifier] else {
            throw BlockError(
                .notFound, "there is no iothread '\(identifier)'", remedy: "object-add makes one")
        }
    }
}
