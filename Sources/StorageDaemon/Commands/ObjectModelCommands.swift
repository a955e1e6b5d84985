import BlockCore
import QMP

// The objects as a tree that can be looked at, in QEMU's object model:
//
//     /                  a container
//     ├── /objects       a container: what object-add made, by identifier
//     │     └── ID       an object with its properties
//     └── /chardevs      a container: what --chardev and chardev-add made
//           └── ID

extension StorageDaemon {
    /// What a path leads to.
    private enum Place {
        case container([(name: String, type: String)])
        case object(identifier: String, ObjectProperties)
        case device(any CharacterDevice)
    }

    /// - Parameter path: absolute, or the identifier of an object alone.
    private func place(at path: String) throws(BlockError) -> Place {
        let parts = path.split(separator: "/").map(String.init)
        let isAbsolute = path.hasPrefix("/")
        switch (parts.count, parts.first) {
        case (0, _) where isAbsolute:
            return .container([("objects", "container"), ("chardevs", "container")])
        case (1, "objects") where isAbsolute:
            let objects = objectProperties.sorted { $0.key < $1.key }
            return .container(objects.map { ($0.key, $0.value.kind.rawValue) })
        case (1, "chardevs") where isAbsolute:
            let devices = characterDevices.sorted { $0.key < $1.key }
            return .container(devices.map { ($0.key, $0.value.typeName) })
        case (2, "objects"), (1, _):
            if let name = parts.last, let object = objectProperties[name],
                isAbsolute == (parts.count == 2)
            {
                return .object(identifier: name, object)
            }
        case (2, "chardevs"):
            if let device = characterDevices[parts[1]] { return .device(device) }
        default: break
        }
        throw BlockError(.notFound, "there is no object at '\(path)'")
    }

    /// The properties of what is at a path; `nil` for values that nobody can look at.
    private func properties(
        at path: String
    ) throws(BlockError) -> [(name: String, type: String, value: JSONValue?)] {
        switch try place(at: path) {
        case .container(let children):
            return [("type", "string", "container")]
                + children.map { ($0.name, "child<\($0.type)>", .string("\(path)/\($0.name)")) }
        case .object(_, let object):
            return [("type", "string", .string(object.kind.rawValue))]
                + object.kind.properties.map { ($0.name, $0.type, object[$0.name]) }
        case .device(let device): return [("type", "string", .string(device.typeName))]
        }
    }

    /// `qom-list`.
    func qomList(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-list")
        let path = try reader.required("path")
        try reader.finish()
        return .array(
            try properties(at: path).map { ["name": .string($0.name), "type": .string($0.type)] })
    }

    /// `qom-list-get`: the properties of several paths, with their values.
    func qomListGet(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-list-get")
        var result: [JSONValue] = []
        for path in try reader.list("paths") ?? [] {
            guard case .string(let text) = path else {
                throw BlockError(.invalidArgument, "'paths' must hold strings")
            }
            let values: [JSONValue] = try properties(at: text).map { property in
                var entry: JSONObject = [
                    "name": .string(property.name), "type": .string(property.type),
                ]
                if let value = property.value { entry["value"] = value }
                return .object(entry)
            }
            result.append(["properties": .array(values)])
        }
        try reader.finish()
        return .array(result)
    }

    /// `qom-get`.
    func qomGet(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-get")
        let path = try reader.required("path")
        let name = try reader.required("property")
        try reader.finish()
        if name != "type", let group = throttleGroup(at: path) {
            return try await group.seat.visit { () throws(BlockError) in try group.property(name) }
        }
        guard let property = try properties(at: path).first(where: { $0.name == name }) else {
            throw BlockError(.invalidArgument, "'\(path)' has no property '\(name)'")
        }
        return property.value ?? .null
    }

    /// `qom-set`: of what may change while it is in use.
    func qomSet(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-set")
        let path = try reader.required("path")
        let name = try reader.required("property")
        let value = try reader.value("value") ?? .null
        try reader.finish()
        if let group = throttleGroup(at: path) {
            try await group.seat.visit { () throws(BlockError) in
                try group.setProperty(name, to: value)
            }
            return [:]
        }
        guard case .object(let identifier, var object) = try place(at: path), object[name] != nil
        else {
            throw BlockError(.invalidArgument, "'\(path)' has no property '\(name)'")
        }
        object[name] = value
        switch object.kind {
        case .thread, .mainLoop:
            guard case .integer(let number) = value, number >= 0 else {
                throw BlockError(
                    .invalidArgument, "property '\(name)' expects a number, 0 or above")
            }
            switch objects[identifier] {
            case .thread(let thread)?: try await thread.settings.set([(name, number)])
            case .mainLoop(let settings)?: try await settings.set([(name, number)])
            default: break
            }
        case .authorizationList:
            let list = try AuthorizationList(OptionReader(.object(object.values), of: path))
            if case .authorizationList(let shared)? = objects[identifier] {
                shared.replace(with: list)
            }
        default:
            throw BlockError(
                .permissionDenied,
                "property '\(name)' of '\(path)' cannot change once the object is there",
                remedy: "object-del and object-add it")
        }
        objectProperties[identifier] = object
        return [:]
    }

    // MARK: Types

    private struct TypeEntry {
        let name: String
        let parent: String?
        let isAbstract: Bool
        var isCreatable = false
        var json: JSONValue {
            var result: JSONObject = ["name": .string(name)]
            if isAbstract { result["abstract"] = true }
            if let parent { result["parent"] = .string(parent) }
            return .object(result)
        }
    }

    private static let types: [TypeEntry] =
        [
            TypeEntry(name: "object", parent: nil, isAbstract: true),
            TypeEntry(name: "container", parent: "object", isAbstract: false),
        ]
        + ["authz", "tls-creds", "secret_common", "event-loop-base", "chardev"].map {
            TypeEntry(name: $0, parent: "object", isAbstract: true)
        }
        + DaemonObject.Kind.allCases.map {
            TypeEntry(
                name: $0.rawValue, parent: $0.parent, isAbstract: false, isCreatable: true)
        }
        + CharacterDevices.backends.map {
            TypeEntry(name: "chardev-\($0)", parent: "chardev", isAbstract: false)
        }

    /// `qom-list-types`: those that descend from one, `user-creatable` being what object-add makes.
    func qomListTypes(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-list-types")
        let ancestor = try reader.string("implements")
        let withAbstract = try reader.bool("abstract") ?? false
        try reader.finish()
        func descends(_ type: TypeEntry) -> Bool {
            guard let ancestor else { return true }
            if ancestor == "user-creatable" { return type.isCreatable }
            var next: TypeEntry? = type
            while let entry = next {
                if entry.name == ancestor { return true }
                next = Self.types.first { $0.name == entry.parent }
            }
            return false
        }
        return .array(
            Self.types.filter { (withAbstract || !$0.isAbstract) && descends($0) }.map(\.json))
    }

    /// `qom-list-properties`.
    func qomListProperties(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-list-properties")
        let name = try reader.required("typename")
        try reader.finish()
        guard Self.types.contains(where: { $0.name == name }) else {
            throw BlockError(.notFound, "there is no type '\(name)'")
        }
        let own = DaemonObject.Kind(rawValue: name)?.properties ?? []
        return .array(
            [["name": "type", "type": "string"]]
                + own.map { ["name": .string($0.name), "type": .string($0.type)] })
    }

    // MARK: Table

    // As clients expect it, a path or a type that is not there is no generic error.
    static let objectModelCommands: [DaemonCommand] = {
        let properties = SchemaType.array(.named("ObjectPropertyInfo"))
        return [
            DaemonCommand(
                CommandSchema(
                    "qom-list", .required("path", .string), result: properties,
                    absence: .deviceNotFound), StorageDaemon.qomList),
            DaemonCommand(
                CommandSchema(
                    "qom-list-get", .required("paths", .array(.string)), result: .array(.any),
                    absence: .deviceNotFound), StorageDaemon.qomListGet),
            DaemonCommand(
                CommandSchema(
                    "qom-get", .required("path", .string), .required("property", .string),
                    result: .any, absence: .deviceNotFound), StorageDaemon.qomGet),
            DaemonCommand(
                CommandSchema(
                    "qom-set", .required("path", .string), .required("property", .string),
                    .required("value", .any), absence: .deviceNotFound), StorageDaemon.qomSet),
            DaemonCommand(
                CommandSchema(
                    "qom-list-types", .optional("implements", .string),
                    .optional("abstract", .boolean),
                    result: .array(.named("ObjectTypeInfo"))), StorageDaemon.qomListTypes),
            DaemonCommand(
                CommandSchema(
                    "qom-list-properties", .required("typename", .string), result: properties,
                    absence: .deviceNotFound), StorageDaemon.qomListProperties),
        ]
    }()

    static let objectModelDefinitions: [String: SchemaDefinition] = [
        "ObjectPropertyInfo": .object(
            ObjectSchema([.required("name", .string), .required("type", .string)])),
        "ObjectTypeInfo": .object(
            ObjectSchema([
                .required("name", .string), .optional("abstract", .boolean),
                .optional("parent", .string),
            ])),
    ]
}
