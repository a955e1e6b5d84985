import BlockCore
import QMP

// Character devices, and the open files that clients pass along.

extension StorageDaemon {
    /// Makes a device from options as `--chardev` gives them: `id`, `backend` and the backend's own.
    @discardableResult
    func addCharacterDevice(
        _ options: JSONValue
    ) async throws(BlockError) -> any CharacterDevice {
        let reader = try OptionReader(options, of: "the character device")
        let identifier = try reader.required("id")
        guard characterDevices[identifier] == nil else {
            throw BlockError(
                .alreadyExists, "there is a character device '\(identifier)' already")
        }
        let device = try await CharacterDevices.make(reader, for: self)
        characterDevices[identifier] = device
        return device
    }

    private func requireDevice(
        _ identifier: String
    ) throws(BlockError) -> any CharacterDevice {
        guard let device = characterDevices[identifier] else {
            throw BlockError(.notFound, "there is no character device '\(identifier)'")
        }
        return device
    }

    /// The options of a `ChardevBackend`, `{type, data}`, as those of `--chardev`.
    private func deviceOptions(
        _ identifier: String, _ backend: JSONValue?
    ) throws(BlockError) -> JSONValue {
        guard case .string(let type)? = backend?["type"] else {
            throw BlockError(.invalidArgument, "'backend' needs a 'type'")
        }
        var options: JSONObject = ["id": .string(identifier), "backend": .string(type)]
        if case .object(let data)? = backend?["data"] {
            for (key, value) in data.members where options[key] == nil { options[key] = value }
        }
        guard options["wait"] != true else {
            throw BlockError(
                .invalidArgument, "the daemon does not stop for a client while it runs",
                remedy: "use wait=off")
        }
        return .object(options)
    }

    /// `chardev-add`.
    func chardevAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "chardev-add")
        let identifier = try reader.required("id")
        let backend = try reader.value("backend")
        try reader.finish()
        return Self.made(
            try await addCharacterDevice(try deviceOptions(identifier, backend)))
    }

    /// The name of a new terminal, which its user cannot know otherwise.
    private static func made(_ device: any CharacterDevice) -> JSONValue {
        guard let name = (device as? DescriptorDevice)?.terminalName else { return [:] }
        return ["pty": .string(name)]
    }

    /// `chardev-change`: another device under the same identifier.
    func chardevChange(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "chardev-change")
        let identifier = try reader.required("id")
        let backend = try reader.value("backend")
        try reader.finish()
        let old = try unused(identifier)
        let options = try deviceOptions(identifier, backend)
        characterDevices[identifier] = nil
        do throws(BlockError) {
            let device = try await addCharacterDevice(options)
            old.close()
            return Self.made(device)
        } catch {
            characterDevices[identifier] = old
            throw error
        }
    }

    /// `chardev-remove`.
    func chardevRemove(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "chardev-remove")
        let identifier = try reader.required("id")
        try reader.finish()
        try unused(identifier).close()
        characterDevices[identifier] = nil
        return [:]
    }

    private func unused(_ identifier: String) throws(BlockError) -> any CharacterDevice {
        let device = try requireDevice(identifier)
        guard !device.isUsed else {
            throw BlockError(
                .busy, "the character device '\(identifier)' is busy: a monitor uses it")
        }
        return device
    }

    /// `chardev-send-break`: nothing here knows a break from silence.
    func chardevSendBreak(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "chardev-send-break")
        _ = try requireDevice(try reader.required("id"))
        try reader.finish()
        return [:]
    }

    /// `query-chardev`.
    func queryChardev(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        .array(
            characterDevices.sorted { $0.key < $1.key }.map { identifier, device in
                [
                    "label": .string(identifier), "filename": .string(device.filename),
                    "frontend-open": .bool(device.isUsed),
                ]
            })
    }

    /// `query-chardev-backends`.
    func queryChardevBackends(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        .array(CharacterDevices.backends.map { ["name": .string($0)] })
    }

    // MARK: Ring buffers

    private enum DataFormat: String, CaseIterable { case utf8, base64 }

    private func ringBuffer(_ reader: OptionReader) throws(BlockError) -> RingBuffer {
        let identifier = try reader.required("device")
        guard let buffer = try requireDevice(identifier) as? RingBuffer else {
            throw BlockError(.invalidArgument, "'\(identifier)' is not a ring buffer")
        }
        return buffer
    }

    /// `ringbuf-write`.
    func ringbufWrite(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "ringbuf-write")
        let buffer = try ringBuffer(reader)
        let text = Array(try reader.required("data").utf8)
        let format = try reader.enumeration("format", as: DataFormat.self) ?? .utf8
        try reader.finish()
        guard let bytes = format == .utf8 ? text : Base64.decode(text) else {
            throw BlockError(.invalidArgument, "ringbuf-write: 'data' is not valid base64")
        }
        buffer.write(bytes)
        return [:]
    }

    /// `ringbuf-read`: takes the oldest bytes out.
    func ringbufRead(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "ringbuf-read")
        let buffer = try ringBuffer(reader)
        guard let count = try reader.int("size"), count > 0 else {
            throw BlockError(.invalidArgument, "ringbuf-read: 'size' must be above 0")
        }
        let format = try reader.enumeration("format", as: DataFormat.self) ?? .utf8
        try reader.finish()
        let bytes = buffer.take(count)
        return .string(
            format == .utf8 ? String(decoding: bytes, as: UTF8.self) : Base64.encode(bytes))
    }

    // MARK: Descriptors

    private func callersDescriptors() throws(BlockError) -> PassedDescriptors {
        guard let callerDescriptors else {
            throw BlockError(
                .unsupported, "open files can be passed over a Unix socket only",
                remedy: "connect to a monitor on a Unix socket")
        }
        return callerDescriptors
    }

    /// `getfd`: names an open file that came with the command, for this client.
    func getfd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "getfd")
        let name = try reader.required("fdname")
        try reader.finish()
        let descriptors = try callersDescriptors()
        let descriptor = try descriptors.take()
        // Else it would be taken for a number.
        guard let first = name.utf8.first, first < 0x30 || first > 0x39,
            name.utf8.count <= Limits.nameLengthMax
        else {
            PassedDescriptors.close(descriptor)
            throw BlockError(
                .invalidArgument, "'\(name)' is no name of a descriptor",
                remedy: "begin with a letter")
        }
        try descriptors.name(descriptor, name)
        return [:]
    }

    /// `closefd`.
    func closefd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "closefd")
        let name = try reader.required("fdname")
        try reader.finish()
        guard let descriptor = try callersDescriptors().take(named: name) else {
            throw BlockError(.notFound, "there is no descriptor named '\(name)'")
        }
        PassedDescriptors.close(descriptor)
        return [:]
    }

    /// `add-fd`: puts an open file that came with the command into a set, which opening
    /// `/dev/fdset/ID` takes it from.
    func addfd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "add-fd")
        let wanted = try reader.int("fdset-id")
        let note = try reader.string("opaque")
        try reader.finish()
        let descriptor = try callersDescriptors().take()
        let set: Int
        do throws(BlockError) {
            set = try graph.descriptorSets.add(descriptor, to: wanted, note: note)
        } catch {
            PassedDescriptors.close(descriptor)
            throw error
        }
        return ["fdset-id": .integer(set), "fd": .integer(Int(descriptor))]
    }

    /// `remove-fd`: who has opened it already goes on using it.
    func removefd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "remove-fd")
        guard let set = try reader.int("fdset-id") else {
            throw BlockError(.invalidArgument, "remove-fd: parameter 'fdset-id' is missing")
        }
        let descriptor = try reader.int("fd")
        try reader.finish()
        try graph.descriptorSets.remove(descriptor, from: set)
        return [:]
    }

    /// `query-fdsets`.
    func queryFdsets(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        .array(
            graph.descriptorSets.all.map { set in
                [
                    "fdset-id": .integer(set.identifier),
                    "fds": .array(
                        set.members.map { member in
                            var result: JSONObject = ["fd": .integer(Int(member.descriptor))]
                            if let note = member.note { result["opaque"] = .string(note) }
                            return .object(result)
                        }),
                ]
            })
    }

    // MARK: Table

    static let characterDeviceCommands = [
        DaemonCommand(
            CommandSchema(
                "chardev-add", .required("id", .string), .required("backend", .any), result: .any),
            StorageDaemon.chardevAdd),
        DaemonCommand(
            CommandSchema(
                "chardev-change", .required("id", .string), .required("backend", .any),
                result: .any), StorageDaemon.chardevChange),
        DaemonCommand(
            CommandSchema("chardev-remove", .required("id", .string)), StorageDaemon.chardevRemove),
        DaemonCommand(
            CommandSchema("chardev-send-break", .required("id", .string)),
            StorageDaemon.chardevSendBreak),
        DaemonCommand(
            CommandSchema("query-chardev", result: .array(.any)), StorageDaemon.queryChardev),
        DaemonCommand(
            CommandSchema("query-chardev-backends", result: .array(.any)),
            StorageDaemon.queryChardevBackends),
        DaemonCommand(
            CommandSchema(
                "ringbuf-write", .required("device", .string), .required("data", .string),
                .optional("format", .named("DataFormat"))), StorageDaemon.ringbufWrite),
        DaemonCommand(
            CommandSchema(
                "ringbuf-read", .required("device", .string), .required("size", .integer),
                .optional("format", .named("DataFormat")), result: .string),
            StorageDaemon.ringbufRead),
        DaemonCommand(
            CommandSchema("getfd", .required("fdname", .string)), StorageDaemon.getfd),
        DaemonCommand(
            CommandSchema("closefd", .required("fdname", .string)), StorageDaemon.closefd),
        DaemonCommand(
            CommandSchema(
                "add-fd", .optional("fdset-id", .integer), .optional("opaque", .string),
                result: .named("AddfdInfo")), StorageDaemon.addfd),
        DaemonCommand(
            CommandSchema(
                "remove-fd", .required("fdset-id", .integer), .optional("fd", .integer)),
            StorageDaemon.removefd),
        DaemonCommand(
            CommandSchema("query-fdsets", result: .array(.any)), StorageDaemon.queryFdsets),
    ]

    static let characterDeviceDefinitions: [String: SchemaDefinition] = [
        "DataFormat": .enumeration(["utf8", "base64"]),
        "AddfdInfo": .object(
            ObjectSchema([.required("fdset-id", .integer), .required("fd", .integer)])),
    ]
}
