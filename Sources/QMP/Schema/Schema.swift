import BlockCore

/// The type of a value that QMP carries. Compound types have names, and may refer to themselves.
public indirect enum SchemaType: Sendable, Hashable {
    case string, integer, number, boolean, null
    case any
    case array(SchemaType)
    /// One of ``Schema/definitions``.
    case named(String)
}

/// A member of an object, or an argument of a command.
public struct SchemaMember: Sendable, Equatable {
    public let name: String
    public let type: SchemaType
    public let isOptional: Bool
    public let features: [String]

    private init(_ name: String, _ type: SchemaType, isOptional: Bool, features: [String]) {
        self.name = name
        self.type = type
        self.isOptional = isOptional
        self.features = features
    }

    public static func required(
        _ name: String, _ type: SchemaType, features: [String] = []
    ) -> SchemaMember {
        SchemaMember(name, type, isOptional: false, features: features)
    }

    public static func optional(
        _ name: String, _ type: SchemaType, features: [String] = []
    ) -> SchemaMember {
        SchemaMember(name, type, isOptional: true, features: features)
    }
}

/// An object's members, and those that depend on the value of one of them.
public struct ObjectSchema: Sendable, Equatable {
    public let members: [SchemaMember]
    /// The member whose value chooses a variant.
    public let tag: String?
    /// The name of the object with the further members, by the value of the tag.
    public let variants: [Variant]
    /// Whoever gets the object checks it: more is known there than here.
    public let isCheckedByReceiver: Bool

    public struct Variant: Sendable, Equatable {
        public let value: String
        public let object: String
        public init(_ value: String, _ object: String) {
            self.value = value
            self.object = object
        }
    }

    public init(
        _ members: [SchemaMember], tag: String? = nil, variants: [Variant] = [],
        isCheckedByReceiver: Bool = false
    ) {
        self.members = members
        self.tag = tag
        self.variants = variants
        self.isCheckedByReceiver = isCheckedByReceiver
    }
}

/// What stands behind the name of a type.
public enum SchemaDefinition: Sendable, Equatable {
    case object(ObjectSchema)
    case enumeration([String])
    /// A value of one of these types, told apart by their kind.
    case alternate([SchemaType])
}

/// What a command is called, takes and gives back.
public struct CommandSchema: Sendable, Equatable {
    public let name: String
    public let arguments: Arguments
    /// `nil` for an empty object.
    public let result: SchemaType?
    /// May be run before earlier commands are done, with `exec-oob`.
    public let allowsOutOfBand: Bool
    public let features: [String]
    /// The class of errors that say that what the arguments name is not there.
    public let absence: QMPSession.ErrorClass

    public enum Arguments: Sendable, Equatable {
        case members([SchemaMember])
        /// The members of a named object.
        case named(String)
    }

    public init(
        _ name: String, _ arguments: SchemaMember..., result: SchemaType? = nil,
        allowsOutOfBand: Bool = false, features: [String] = [],
        absence: QMPSession.ErrorClass = .generic
    ) {
        self.name = name
        self.arguments = .members(arguments)
        self.result = result
        self.allowsOutOfBand = allowsOutOfBand
        self.features = features
        self.absence = absence
    }

    public init(
        _ name: String, argumentsOf object: String, result: SchemaType? = nil,
        features: [String] = []
    ) {
        self.name = name
        arguments = .named(object)
        self.result = result
        allowsOutOfBand = false
        self.features = features
        absence = .generic
    }
}

public struct EventSchema: Sendable, Equatable {
    public let name: String
    public let data: [SchemaMember]

    public init(_ name: String, _ data: SchemaMember...) {
        self.name = name
        self.data = data
    }
}

/// All that can be said over QMP: commands, events and the types they use.
public struct Schema: Sendable {
    public let commands: [CommandSchema]
    public let events: [EventSchema]
    public let definitions: [String: SchemaDefinition]
    private let commandIndex: [String: Int]

    public init(
        commands: [CommandSchema], events: [EventSchema], definitions: [String: SchemaDefinition]
    ) {
        self.commands = commands
        self.events = events
        self.definitions = definitions
        commandIndex = Dictionary(
            commands.enumerated().map { ($1.name, $0) }, uniquingKeysWith: { first, _ in first })
    }

    public func command(named name: String) -> CommandSchema? {
        commandIndex[name].map { commands[$0] }
    }

    /// The result of `query-commands`.
    public var commandList: JSONValue {
        .array(commands.map { ["name": .string($0.name)] })
    }

    func object(named name: String) -> ObjectSchema {
        if case .object(let object) = definitions[name] { return object }
        return ObjectSchema([])
    }

    /// Names that types refer to and that stand for nothing: none, in a sound schema.
    public var undefinedNames: [String] {
        var used: [SchemaType] = []
        for command in commands {
            if let result = command.result { used.append(result) }
            switch command.arguments {
            case .members(let members): used += members.map(\.type)
            case .named(let name): used.append(.named(name))
            }
        }
        used += events.flatMap { $0.data.map(\.type) }
        for definition in definitions.values {
            switch definition {
            case .object(let object):
                used += object.members.map(\.type) + object.variants.map { .named($0.object) }
            case .alternate(let types): used += types
            case .enumeration: break
            }
        }
        var missing: Set<String> = []
        for type in used {
            if let name = Self.name(in: type), definitions[name] == nil { missing.insert(name) }
        }
        return missing.sorted()
    }

    private static func name(in type: SchemaType) -> String? {
        switch type {
        case .named(let name): name
        case .array(let element): name(in: element)
        default: nil
        }
    }
}
