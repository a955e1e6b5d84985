import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTLS
import QMP

/// An object of `object-add`: other commands refer to it by its identifier.
enum DaemonObject {
    enum Kind: String, CaseIterable {
        case secret
        case keyringSecret = "secret_keyring"
        case certificates = "tls-creds-x509"
        case keys = "tls-creds-psk"
        case anonymous = "tls-creds-anon"
        case cipherSuites = "tls-cipher-suites"
        case authorization = "authz-simple"
        case authorizationList = "authz-list"
        case authorizationFile = "authz-list-file"
        case thread = "iothread"
        case mainLoop = "main-loop"
        case throttleGroup = "throttle-group"
    }

    case secret(SecretBytes)
    case credentials(TLSCredentials)
    /// Of virtual machines' firmware; nothing here uses it.
    case cipherSuites
    /// Says who may come in.
    case authorization(@Sendable (String) -> Bool)
    case authorizationList(SharedAuthorizationList)
    case thread(DaemonThread)
    /// Of the main thread.
    case mainLoop(ThreadSettings)
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
        try Self.checkIdentifier(identifier, of: "an object")
        guard objects[identifier] == nil else {
            throw BlockError(.alreadyExists, "there is an object '\(identifier)' already")
        }
        let object = try await makeObject(kind, reader)
        objects[identifier] = object
        objectProperties[identifier] = ObjectProperties(kind, arguments)
        return [:]
    }

    /// `object-del`. Who uses it already goes on doing so; but a throttle group and a thread go after their
    /// nodes.
    func objectDel(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "object-del")
        let identifier = try reader.required("id")
        try reader.finish()
        guard objects[identifier] != nil else {
            throw BlockError(.notFound, "there is no object '\(identifier)'")
        }
        switch objects[identifier] {
        case .thread(let thread)?: try await end(thread)
        case .mainLoop?:
            throw BlockError(
                .busy, "object '\(identifier)' is in use: the main thread runs by it",
                remedy: "qom-set changes its properties")
        default: break
        }
        try graph.removeObject(identifier)
        objects[identifier] = nil
        objectProperties[identifier] = nil
        return [:]
    }

    private func makeObject(
        _ kind: DaemonObject.Kind, _ reader: OptionReader
    ) async throws(BlockError) -> DaemonObject {
        switch kind {
        case .secret: return .secret(try await secret(.plain, reader))
        case .keyringSecret: return .secret(try await secret(.keyring, reader))
        case .certificates: return .credentials(try await certificates(reader))
        case .keys: return .credentials(try await keys(reader))
        case .anonymous: return .credentials(try await anonymous(reader))
        case .cipherSuites: return try await cipherSuites(reader)
        case .authorization:
            let identity = try reader.required("identity")
            try reader.finish()
            return .authorization { $0 == identity }
        case .authorizationList:
            let list = try AuthorizationList(reader)
            try reader.finish()
            return .authorizationList(SharedAuthorizationList(list))
        case .authorizationFile:
            // It is read again when a daemon has left the folder it was started in.
            let path = WorkingFolder.absolute(try reader.required("filename"))
            let refreshes = try reader.bool("refresh") ?? true
            try reader.finish()
            let file = try await thread.offload { () throws(BlockError) in
                try AuthorizationFile(path, refreshes: refreshes)
            }
            return .authorization { file.allows($0) }
        case .thread: return .thread(try await makeThread(reader))
        case .mainLoop: return .mainLoop(try await makeMainLoop(reader))
        case .throttleGroup:
            let limits = try ThrottleGroup.properties(reader)
            let group = try ThrottleGroup(try reader.required("id"), limits, on: thread)
            try graph.addObject(group, as: group.identifier)
            return .throttleGroup(group)
        }
    }

    // MARK: Secrets

    /// Makes a secret, which options of nodes name from now on.
    private func secret(
        _ kind: GraphSecret.Kind, _ reader: OptionReader
    ) async throws(BlockError) -> SecretBytes {
        let identifier = try reader.required("id")
        let secret = try await GraphSecret.read(kind, reader, in: graph)
        try graph.addObject(secret, as: identifier)
        return secret.bytes
    }

    private func requireSecret(_ identifier: String) throws(BlockError) -> SecretBytes {
        guard case .secret(let bytes)? = objects[identifier] else {
            throw BlockError(
                .notFound, "there is no secret '\(identifier)'",
                remedy: "add one before: --object secret,id=\(identifier),file=…, or object-add")
        }
        return bytes
    }

    // MARK: TLS

    private func certificates(_ reader: OptionReader) async throws(BlockError) -> TLSCredentials {
        let directory = try reader.string("dir") ?? "/etc/pki/qemu"
        let endpoint = try reader.enumeration("endpoint", as: TLSEndpoint.self) ?? .client
        let verifiesPeer = try reader.bool("verify-peer") ?? true
        let priority = try reader.string("priority") ?? TLSCredentials.defaultPriority
        let verifiesIdentity = try reader.bool("sanity-check") ?? true
        var password: String?
        if let identifier = try reader.string("passwordid") {
            password = String(validating: try requireSecret(identifier).array, as: UTF8.self)
        }
        try reader.finish()
        let keyPassword = password
        return try await thread.offload { () throws(BlockError) in
            try TLSCredentials.x509(
                directory: directory, endpoint: endpoint, verifiesPeer: verifiesPeer,
                priority: priority, keyPassword: keyPassword, verifiesIdentity: verifiesIdentity)
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

    private func anonymous(_ reader: OptionReader) async throws(BlockError) -> TLSCredentials {
        // There is nothing to be read from a directory, and nobody to verify.
        _ = try reader.string("dir")
        _ = try reader.bool("verify-peer")
        let endpoint = try reader.enumeration("endpoint", as: TLSEndpoint.self) ?? .client
        let priority = try reader.string("priority") ?? TLSCredentials.defaultPriority
        try reader.finish()
        return try .anonymous(endpoint: endpoint, priority: priority)
    }

    /// A list of ciphers, as a priority string names it. QEMU hands it to a machine's firmware; a daemon
    /// checks it.
    private func cipherSuites(_ reader: OptionReader) async throws(BlockError) -> DaemonObject {
        _ = try reader.string("dir")
        _ = try reader.enumeration("endpoint", as: TLSEndpoint.self)
        _ = try reader.bool("verify-peer")
        let priority = try reader.required("priority")
        try reader.finish()
        try await thread.offload { () throws(BlockError) in
            try TLSCredentials.check(priority: priority)
        }
        return .cipherSuites
    }

    // MARK: Users of objects

    /// Makes an object from text as `--object` gives it.
    public func addObject(_ text: String) async throws(BlockError) {
        // Its text stays out of messages: a secret may be in it.
        var name = "--object"
        do throws(BlockError) {
            let options = try KeyValue.parse(text, impliedKey: "qom-type")
            if case .string(let type)? = options["qom-type"], case .string(let id)? = options["id"]
            {
                name += " \(type),id=\(id)"
            }
            _ = try await objectAdd(options)
        } catch {
            throw BlockError(error.code, "\(name): \(error.description)")
        }
    }

    /// Gives another graph of this thread the objects that options of nodes name: the same ones, not
    /// copies of them.
    public func shareObjects(with other: BlockGraph) throws(BlockError) {
        for identifier in objects.keys.sorted() {
            guard let object = graph.object(identifier) else { continue }
            try other.addObject(object, as: identifier)
        }
    }

    /// - Throws: when there are none of that name, or they are for the other side.
    public func tlsCredentials(
        _ identifier: String, for endpoint: TLSEndpoint
    ) throws(BlockError) -> TLSCredentials {
        guard case .credentials(let credentials)? = objects[identifier] else {
            throw BlockError(
                .notFound, "there are no TLS credentials '\(identifier)'",
                remedy: "add them: --object tls-creds-x509,id=\(identifier),…, or object-add")
        }
        guard credentials.endpoint == endpoint else {
            throw BlockError(
                .invalidArgument,
                "the TLS credentials '\(identifier)' are a \(credentials.endpoint.rawValue)'s",
                remedy: "add them with endpoint=\(endpoint.rawValue)")
        }
        return credentials
    }

    /// Who an authorization object lets in.
    public func authorization(
        _ identifier: String
    ) throws(BlockError) -> @Sendable (String) -> Bool {
        switch objects[identifier] {
        case .authorization(let allows): return allows
        case .authorizationList(let list): return { list.allows($0) }
        default:
            throw BlockError(
                .notFound, "there is no authorization object '\(identifier)'",
                remedy: "add one: --object authz-list,id=\(identifier),…, or object-add")
        }
    }
}
