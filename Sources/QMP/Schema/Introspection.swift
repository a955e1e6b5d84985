/// The result of `query-qmp-schema`: `SchemaInfo` entities, as QEMU's introspection defines them.
///
/// Commands and events come first, by their names; every other type has a number for a name, since
/// clients must not rely on what types are called.
extension Schema {
    public var introspection: JSONValue {
        var listing = SchemaListing(self)
        return .array(listing.entities())
    }
}

private struct SchemaListing {
    private let schema: Schema
    private var names: [String: String] = [:]
    private var waiting: [(name: String, definition: SchemaDefinition)] = []
    private var others: [JSONValue] = []
    private var listed: Set<String> = []
    private var numberCount = 0

    init(_ schema: Schema) {
        self.schema = schema
    }

    mutating func entities() -> [JSONValue] {
        var result: [JSONValue] = []
        for command in schema.commands {
            var entity: JSONObject = [
                "name": .string(command.name), "meta-type": "command",
                "arg-type": .string(arguments(of: command)),
                "ret-type": .string(command.result.map { name(of: $0) } ?? emptyObject()),
            ]
            if command.allowsOutOfBand { entity["allow-oob"] = true }
            add(features: command.features, to: &entity)
            result.append(.object(entity))
        }
        for event in schema.events {
            result.append([
                "name": .string(event.name), "meta-type": "event",
                "arg-type": .string(object(event.data)),
            ])
        }
        // Describing a type can bring further ones.
        while !waiting.isEmpty {
            let (name, definition) = waiting.removeFirst()
            others.append(describe(definition, name))
        }
        return result + others
    }

    private mutating func arguments(of command: CommandSchema) -> String {
        switch command.arguments {
        case .members(let members): object(members)
        case .named(let name): self.name(of: .named(name))
        }
    }

    private mutating func emptyObject() -> String { object([]) }

    /// An object that has no name in the schema.
    private mutating func object(_ members: [SchemaMember]) -> String {
        if members.isEmpty, let known = names[""] { return known }
        let name = newNumber()
        if members.isEmpty { names[""] = name }
        waiting.append((name, .object(ObjectSchema(members))))
        return name
    }

    private mutating func newNumber() -> String {
        defer { numberCount += 1 }
        return String(numberCount)
    }

    private mutating func name(of type: SchemaType) -> String {
        switch type {
        case .string: return builtin("str", "string")
        case .integer: return builtin("int", "int")
        case .number: return builtin("number", "number")
        case .boolean: return builtin("bool", "boolean")
        case .null: return builtin("null", "null")
        case .any: return builtin("any", "value")
        case .array(let element):
            let element = name(of: element)
            let name = "[\(element)]"
            if listed.insert(name).inserted {
                others.append([
                    "name": .string(name), "meta-type": "array", "element-type": .string(element),
                ])
            }
            return name
        case .named(let known):
            if let name = names[known] { return name }
            let name = newNumber()
            names[known] = name
            waiting.append((name, schema.definitions[known] ?? .object(ObjectSchema([]))))
            return name
        }
    }

    private mutating func builtin(_ name: String, _ jsonType: String) -> String {
        if listed.insert(name).inserted {
            others.append([
                "name": .string(name), "meta-type": "builtin", "json-type": .string(jsonType),
            ])
        }
        return name
    }

    private mutating func describe(
        _ definition: SchemaDefinition, _ name: String
    ) -> JSONValue {
        var entity: JSONObject = ["name": .string(name)]
        switch definition {
        case .enumeration(let values):
            entity["meta-type"] = "enum"
            entity["members"] = .array(values.map { ["name": .string($0)] })
            entity["values"] = .array(values.map { .string($0) })
        case .alternate(let types):
            entity["meta-type"] = "alternate"
            var members: [JSONValue] = []
            for type in types { members.append(["type": .string(self.name(of: type))]) }
            entity["members"] = .array(members)
        case .object(let object):
            entity["meta-type"] = "object"
            var members: [JSONValue] = []
            for member in object.members { members.append(describe(member)) }
            entity["members"] = .array(members)
            if let tag = object.tag {
                entity["tag"] = .string(tag)
                var variants: [JSONValue] = []
                for variant in object.variants {
                    variants.append([
                        "case": .string(variant.value),
                        "type": .string(self.name(of: .named(variant.object))),
                    ])
                }
                entity["variants"] = .array(variants)
            }
        }
        return .object(entity)
    }

    private mutating func describe(_ member: SchemaMember) -> JSONValue {
        var result: JSONObject = [
            "name": .string(member.name), "type": .string(name(of: member.type)),
        ]
        // A default of null says that the member is optional.
        if member.isOptional { result["default"] = JSONValue.null }
        add(features: member.features, to: &result)
        return .object(result)
    }

    private func add(features: [String], to entity: inout JSONObject) {
        if !features.isEmpty { entity["features"] = .array(features.map { .string($0) }) }
    }
}
