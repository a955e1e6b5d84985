import BlockCore

/// The server's side of one QMP connection, without its I/O.
///
/// ```
///            greeting                 qmp_capabilities
///   start ──────────────► negotiating ────────────────► commands
///                         other commands are refused     events are sent
/// ```
///
/// Bytes go in with ``receive(_:)``; ``next()`` gives what to do, one command after the other; the
/// caller runs it and sends the bytes of ``reply(to:_:)``. Commands out of band overtake those that
/// wait. Bounded: the caller reads on only while ``wantsBytes``.
///
/// The protocol is that of QEMU's "QMP Protocol Specification"; sections are named below.
public struct QMPSession: Sendable {
    /// Requests that wait; the protocol lets a client send 8 before it has to read replies (§2.3.1).
    public static let queueLengthMax = 8

    /// A command as it came.
    public struct Request: Sendable {
        public let command: CommandSchema
        public let arguments: JSONValue
        /// What the reply has to carry.
        public let identifier: JSONValue?
        /// Not to wait for earlier commands.
        public let isOutOfBand: Bool
    }

    public enum Step: Sendable {
        /// A reply that needs no command to be run.
        case send([UInt8])
        case run(Request)
    }

    /// Classes of errors (§2.4.2).
    public enum ErrorClass: String, Sendable {
        case generic = "GenericError"
        case commandNotFound = "CommandNotFound"
        case deviceNotActive = "DeviceNotActive"
        case deviceNotFound = "DeviceNotFound"
        case kvmMissingCapability = "KVMMissingCap"
    }

    private enum Arrival: Sendable {
        case request(name: String, arguments: JSONValue, id: JSONValue?, isOutOfBand: Bool)
        case refused(BlockError, id: JSONValue?)
    }

    public let schema: Schema
    /// Replies have a line for each member.
    public let isPretty: Bool
    private var framer = JSONFramer()
    private var unread: ArraySlice<UInt8> = []
    private var arrivals: [Arrival] = []
    /// Negotiation is over; events may be sent.
    public private(set) var isReady = false
    private var hasOutOfBand = false

    /// The result of `query-version`: of the interface that is kept, since clients look up features
    /// by it, and of Merino itself.
    public static let version: JSONValue = [
        "qemu": ["micro": 0, "minor": 2, "major": 10], "package": "merino-0.1.0",
    ]

    public init(_ schema: Schema, isPretty: Bool = false) {
        self.schema = schema
        self.isPretty = isPretty
    }

    /// What the client is sent first (§2.2).
    public var greeting: [UInt8] {
        let greeting: JSONValue = ["QMP": ["version": Self.version, "capabilities": ["oob"]]]
        return greeting.line(pretty: isPretty)
    }

    // MARK: Input

    /// Whether more bytes can be taken.
    public var wantsBytes: Bool { unread.isEmpty && arrivals.count < Self.queueLengthMax }

    public mutating func receive(_ bytes: [UInt8]) {
        unread += bytes[...]
        fill()
    }

    /// Ends the input: a document that has not ended is reported.
    public mutating func receiveEnd() {
        guard framer.isInDocument else { return }
        arrivals.append(
            .refused(
                BlockError(.invalidArgument, "JSON parse error: the document has no end"), id: nil))
    }

    /// Forgets what has not been run.
    public mutating func drop() {
        unread = []
        arrivals = []
    }

    private mutating func fill() {
        while arrivals.count < Self.queueLengthMax, let byte = unread.popFirst() {
            switch framer.take(byte) {
            case nil: continue
            case .success(let document): arrivals.append(Self.arrival(document))
            case .failure(let error): arrivals.append(.refused(error, id: nil))
            }
        }
        if unread.isEmpty { unread = [] }
    }

    /// Reads the members of a request (§2.3).
    private static func arrival(_ document: JSONValue) -> Arrival {
        guard case .object(let object) = document else {
            return .refused(
                BlockError(.invalidArgument, "QMP input must be a JSON object"), id: nil)
        }
        let identifier = object["id"]
        var name: String?
        var isOutOfBand = false
        var arguments: JSONValue = [:]
        func refused(_ reason: String) -> Arrival {
            .refused(BlockError(.invalidArgument, reason), id: identifier)
        }
        for (key, value) in object.members {
            switch key {
            case "execute", "exec-oob":
                guard case .string(let text) = value else {
                    return refused("QMP input member '\(key)' must be a string")
                }
                guard name == nil else {
                    return refused("QMP input members 'execute' and 'exec-oob' exclude each other")
                }
                name = text
                isOutOfBand = key == "exec-oob"
            case "arguments":
                guard case .object = value else {
                    return refused("QMP input member 'arguments' must be an object")
                }
                arguments = value
            case "id": continue
            default: return refused("QMP input member '\(key)' is unexpected")
            }
        }
        guard let name else { return refused("QMP input lacks member 'execute'") }
        return .request(name: name, arguments: arguments, id: identifier, isOutOfBand: isOutOfBand)
    }

    // MARK: Steps

    /// What to do next, in the order in which requests came. Call it again when that is done.
    public mutating func next() -> Step? {
        fill()
        guard !arrivals.isEmpty else { return nil }
        let arrival = arrivals.removeFirst()
        fill()
        return step(for: arrival)
    }

    /// A command out of band that waits, before those that came earlier; to be run at once.
    public mutating func nextOutOfBand() -> Step? {
        fill()
        guard hasOutOfBand else { return nil }
        let place = arrivals.firstIndex { arrival in
            if case .request(_, _, _, isOutOfBand: true) = arrival { return true }
            return false
        }
        guard let place else { return nil }
        let arrival = arrivals.remove(at: place)
        fill()
        return step(for: arrival)
    }

    private mutating func step(for arrival: Arrival) -> Step {
        guard case .request(let name, let arguments, let identifier, let isOutOfBand) = arrival
        else {
            if case .refused(let error, let id) = arrival {
                return .send(message(.generic, error.description, id))
            }
            return .send([])
        }
        func refuse(_ errorClass: ErrorClass, _ reason: String) -> Step {
            .send(message(errorClass, reason, identifier))
        }
        if !isReady, name != "qmp_capabilities" {
            return refuse(
                .commandNotFound, "expecting capabilities negotiation with 'qmp_capabilities'")
        }
        if isReady, name == "qmp_capabilities" {
            return refuse(
                .commandNotFound, "capabilities negotiation is complete already: command ignored")
        }
        guard let command = schema.command(named: name) else {
            let near = OptionReader.nearest(to: name, in: schema.commands.map(\.name))
            return refuse(
                .commandNotFound,
                "the command '\(name)' has not been found"
                    + (near.map { "; did you mean '\($0)'?" } ?? ""))
        }
        if isOutOfBand, name != "qmp_capabilities" {
            guard hasOutOfBand else {
                return refuse(
                    .generic, "'exec-oob' needs the capability 'oob' to be negotiated first")
            }
            guard command.allowsOutOfBand else {
                return refuse(.generic, "the command '\(name)' does not support out-of-band")
            }
        }
        do throws(BlockError) {
            try schema.check(arguments, of: command)
        } catch {
            return refuse(.generic, error.description)
        }
        let request = Request(
            command: command, arguments: arguments, identifier: identifier, isOutOfBand: isOutOfBand
        )
        return name == "qmp_capabilities" ? negotiate(request) : .run(request)
    }

    /// `qmp_capabilities` (§3): leaves the negotiation.
    private mutating func negotiate(_ request: Request) -> Step {
        if case .array(let wanted)? = request.arguments["enable"] {
            hasOutOfBand = wanted.contains(.string("oob"))
        }
        isReady = true
        return .send(reply(to: request, .success([:])))
    }

    // MARK: Output

    /// The reply to a command that was run (§2.4).
    public func reply(
        to request: Request, _ result: Result<JSONValue, BlockError>
    ) -> [UInt8] {
        switch result {
        case .success(let value):
            var reply: JSONObject = ["return": value]
            if let identifier = request.identifier { reply["id"] = identifier }
            return JSONValue.object(reply).line(pretty: isPretty)
        case .failure(let error):
            let errorClass = error.code == .notFound ? request.command.absence : .generic
            return message(errorClass, error.description, request.identifier)
        }
    }

    /// An event (§2.5), or `nil` where the client has not negotiated yet.
    ///
    /// - Parameter microseconds: when it happened, since the epoch.
    public func event(_ name: String, _ data: JSONValue, microseconds: Int) -> [UInt8]? {
        guard isReady else { return nil }
        var event: JSONObject = [
            "timestamp": [
                "seconds": .integer(microseconds / 1_000_000),
                "microseconds": .integer(microseconds % 1_000_000),
            ],
            "event": .string(name),
        ]
        if case .object(let object) = data, !object.isEmpty { event["data"] = data }
        return JSONValue.object(event).line(pretty: isPretty)
    }

    private func message(
        _ errorClass: ErrorClass, _ description: String, _ identifier: JSONValue?
    ) -> [UInt8] {
        var reply: JSONObject = [
            "error": ["class": .string(errorClass.rawValue), "desc": .string(description)]
        ]
        if let identifier { reply["id"] = identifier }
        return JSONValue.object(reply).line(pretty: isPretty)
    }
}
