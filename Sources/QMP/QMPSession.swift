import BlockCore

/// One QMP client's session as a state machine, without I/O.
///
///     greeting ─▶ negotiation ──qmp_capabilities──▶ commands, events
///
/// Every document gets exactly one response, in order; `id` comes back as it was.
public struct QMPSession {
    /// What the caller does with a document.
    public enum Action {
        /// Send this.
        case respond(JSONValue)
        /// Execute the command, then send what ``success(_:id:)`` or ``failure(_:id:)`` makes of it.
        case execute(command: String, arguments: JSONValue, id: JSONValue?)
    }

    /// The error classes of the protocol.
    public enum ErrorClass: String, Sendable {
        case generic = "GenericError"
        case commandNotFound = "CommandNotFound"
        case deviceNotFound = "DeviceNotFound"
    }

    /// Commands may be given; events are sent.
    public private(set) var isNegotiated = false

    public init() {}

    /// The version whose interface this is: clients ask for features by it.
    public static let version: JSONValue = [
        "qemu": ["micro": 0, "minor": 2, "major": 10], "package": "merino-0.1.0",
    ]

    public static var greeting: JSONValue {
        ["QMP": ["version": version, "capabilities": ["oob"]]]
    }

    public mutating func receive(_ document: [UInt8]) -> Action {
        do throws(BlockError) {
            return try understand(JSONParser.parse(document))
        } catch {
            return .respond(Self.error(.generic, error.description, id: nil))
        }
    }

    private mutating func understand(_ value: JSONValue) throws(BlockError) -> Action {
        guard case .object(let object) = value else {
            throw BlockError(.invalidArgument, "QMP input must be a JSON object")
        }
        let id = object["id"]
        for member in object.members
        where !["execute", "exec-oob", "arguments", "id", "control"].contains(member.key) {
            return .respond(
                Self.error(.generic, "QMP input member '\(member.key)' is unexpected", id: id))
        }
        guard case .string(let command)? = object["execute"] ?? object["exec-oob"] else {
            return .respond(Self.error(.generic, "QMP input lacks member 'execute'", id: id))
        }
        let arguments = object["arguments"] ?? [:]
        guard case .object = arguments else {
            return .respond(
                Self.error(.generic, "QMP input member 'arguments' must be an object", id: id))
        }
        if command == "qmp_capabilities" { return .respond(negotiate(arguments, id)) }
        guard isNegotiated else {
            return .respond(
                Self.error(
                    .commandNotFound,
                    "Expecting capabilities negotiation with 'qmp_capabilities'", id: id))
        }
        if object["execute"] == nil {
            return .respond(
                Self.error(.generic, "The command \(command) does not support OOB", id: id))
        }
        return .execute(command: command, arguments: arguments, id: id)
    }

    private mutating func negotiate(_ arguments: JSONValue, _ id: JSONValue?) -> JSONValue {
        guard !isNegotiated else {
            return Self.error(
                .commandNotFound, "Capabilities negotiation is already complete, command ignored",
                id: id)
        }
        if case .array(let wanted)? = arguments["enable"],
            let unknown = wanted.first(where: { $0 != "oob" })
        {
            return Self.error(
                .generic, "there is no capability \(unknown.text())", id: id)
        }
        isNegotiated = true
        return Self.success([:], id: id)
    }

    public static func success(_ result: JSONValue, id: JSONValue?) -> JSONValue {
        var response: JSONObject = ["return": result]
        if let id { response["id"] = id }
        return .object(response)
    }

    public static func error(
        _ kind: ErrorClass, _ description: String, id: JSONValue?
    ) -> JSONValue {
        var response: JSONObject = [
            "error": ["class": .string(kind.rawValue), "desc": .string(description)]
        ]
        if let id { response["id"] = id }
        return .object(response)
    }

    /// An event, at a time since 1970.
    public static func event(
        _ name: String, _ data: JSONValue, seconds: Int, microseconds: Int
    ) -> JSONValue {
        var event: JSONObject = [
            "timestamp": ["seconds": .integer(seconds), "microseconds": .integer(microseconds)],
            "event": .string(name),
        ]
        if case .object(let members) = data, !members.isEmpty { event["data"] = data }
        return .object(event)
    }
}
