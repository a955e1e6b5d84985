import QMP

/// What an object was made with, for the `qom-` commands: its type's properties, each with a value.
struct ObjectProperties: Sendable {
    struct Property: Sendable {
        let name: String
        /// As QEMU's object model names it.
        let type: String
        /// What holds when it was not given; null where nothing does.
        let standard: JSONValue
        /// Given once, and shown to nobody: it is not kept among the values.
        let isSecret: Bool

        init(
            _ name: String, _ type: String, _ standard: JSONValue = .null, isSecret: Bool = false
        ) {
            self.name = name
            self.type = type
            self.standard = standard
            self.isSecret = isSecret
        }
    }

    let kind: DaemonObject.Kind
    private(set) var values: JSONObject

    init(_ kind: DaemonObject.Kind, _ arguments: JSONValue) {
        self.kind = kind
        values = [:]
        for property in kind.properties where !property.isSecret {
            values[property.name] = arguments[property.name] ?? property.standard
        }
    }

    subscript(name: String) -> JSONValue? {
        get { values[name] }
        set { values[name] = newValue }
    }
}

extension DaemonObject.Kind {
    /// The type it descends from.
    var parent: String {
        switch self {
        case .secret, .keyringSecret: "secret_common"
        case .certificates, .keys, .anonymous, .cipherSuites: "tls-creds"
        case .authorization, .authorizationList, .authorizationFile: "authz"
        case .thread, .mainLoop: "event-loop-base"
        case .throttleGroup: "object"
        }
    }

    var properties: [ObjectProperties.Property] {
        typealias Property = ObjectProperties.Property
        let wrapping = [
            Property("format", "QCryptoSecretFormat", "raw"), Property("keyid", "string", ""),
            Property("iv", "string", ""),
        ]
        let credentials = [
            Property("dir", "string", ""),
            Property("endpoint", "QCryptoTLSCredsEndpoint", "client"),
            Property("verify-peer", "bool", true), Property("priority", "string", ""),
        ]
        switch self {
        case .secret:
            return [
                Property("data", "string", isSecret: true), Property("file", "string", ""),
            ] + wrapping
        case .keyringSecret: return [Property("serial", "int32", 0)] + wrapping
        case .certificates:
            return credentials + [
                Property("sanity-check", "bool", true), Property("passwordid", "string", ""),
            ]
        case .keys: return credentials + [Property("username", "string", "qemu")]
        case .anonymous, .cipherSuites: return credentials
        case .authorization: return [Property("identity", "string", "")]
        case .authorizationList:
            return [
                Property("policy", "QAuthZListPolicy", "deny"),
                Property("rules", "QAuthZListRule", []),
            ]
        case .authorizationFile:
            return [Property("filename", "string", ""), Property("refresh", "bool", true)]
        case .throttleGroup: return [Property("limits", "ThrottleLimits")]
        case .thread:
            return [
                Property("poll-max-ns", "int", 32768), Property("poll-grow", "int", 0),
                Property("poll-shrink", "int", 0),
            ] + DaemonObject.Kind.mainLoop.properties
        case .mainLoop:
            return [
                Property("aio-max-batch", "int", 0), Property("thread-pool-min", "int", 0),
                Property("thread-pool-max", "int", 64),
            ]
        }
    }
}
