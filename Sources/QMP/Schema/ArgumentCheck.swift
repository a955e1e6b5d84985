import BlockCore

extension Schema {
    /// Checks the arguments of a command before it runs.
    ///
    /// - Throws: `invalidArgument` that names the parameter: missing, unknown, of a wrong type, or
    ///   with a value that its enumeration does not have.
    public func check(
        _ arguments: JSONValue, of command: CommandSchema
    ) throws(BlockError) {
        let object =
            switch command.arguments {
            case .members(let members): ObjectSchema(members)
            case .named(let name): self.object(named: name)
            }
        try check(arguments, object, command.name, path: "")
    }

    private func check(
        _ value: JSONValue, _ type: SchemaType, _ command: String, path: String
    ) throws(BlockError) {
        switch (type, value) {
        case (.any, _), (.string, .string), (.integer, .integer), (.integer, .unsigned),
            (.number, .integer), (.number, .unsigned), (.number, .double), (.boolean, .bool),
            (.null, .null):
            return
        case (.array(let element), .array(let values)):
            for (place, value) in values.enumerated() {
                try check(value, element, command, path: "\(path)[\(place)]")
            }
        case (.named(let name), _):
            try check(value, named: name, command, path: path)
        default:
            throw BlockError(
                .invalidArgument,
                "\(command): parameter '\(path)' expects \(describe(type)), not \(value.kind)")
        }
    }

    private func check(
        _ value: JSONValue, named name: String, _ command: String, path: String
    ) throws(BlockError) {
        switch definitions[name] {
        case .enumeration(let values):
            guard case .string(let text) = value else {
                throw BlockError(
                    .invalidArgument,
                    "\(command): parameter '\(path)' expects a string, not \(value.kind)")
            }
            guard values.contains(text) else {
                throw BlockError(
                    .invalidArgument,
                    "\(command): parameter '\(path)' does not accept the value '\(text)'",
                    remedy: "use one of \(values.joined(separator: ", "))")
            }
        case .alternate(let types):
            guard let type = types.first(where: { accepts($0, value) }) else {
                let choices = types.map(describe).joined(separator: " or ")
                throw BlockError(
                    .invalidArgument,
                    "\(command): parameter '\(path)' expects \(choices), not \(value.kind)")
            }
            try check(value, type, command, path: path)
        case .object(let object):
            try check(value, object, command, path: path)
        case nil:
            return
        }
    }

    private func check(
        _ value: JSONValue, _ schema: ObjectSchema, _ command: String, path: String
    ) throws(BlockError) {
        guard case .object(let object) = value else {
            let subject = path.isEmpty ? "'arguments'" : "parameter '\(path)'"
            throw BlockError(
                .invalidArgument, "\(command): \(subject) expects an object, not \(value.kind)")
        }
        if schema.isCheckedByReceiver { return }
        let prefix = path.isEmpty ? "" : "\(path)."
        var members = schema.members
        if let tag = schema.tag, case .string(let text)? = object[tag],
            let variant = schema.variants.first(where: { $0.value == text })
        {
            let more = self.object(named: variant.object)
            if more.isCheckedByReceiver { return }
            members += more.members
        }
        for member in members {
            guard let value = object[member.name] else {
                if member.isOptional { continue }
                throw BlockError(
                    .invalidArgument,
                    "\(command): parameter '\(prefix)\(member.name)' is missing")
            }
            try check(value, member.type, command, path: prefix + member.name)
        }
        for (key, _) in object.members where !members.contains(where: { $0.name == key }) {
            let near = OptionReader.nearest(to: key, in: members.map(\.name))
            throw BlockError(
                .invalidArgument, "\(command): parameter '\(prefix)\(key)' is unexpected",
                remedy: near.map { "did you mean '\(prefix)\($0)'?" })
        }
    }

    private func accepts(_ type: SchemaType, _ value: JSONValue) -> Bool {
        if case .named(let name) = type {
            switch (definitions[name], value) {
            case (.enumeration, .string), (.object, .object): return true
            case (.alternate(let types), _): return types.contains { accepts($0, value) }
            default: return false
            }
        }
        switch (type, value) {
        case (.any, _), (.string, .string), (.integer, .integer), (.integer, .unsigned),
            (.number, .integer), (.number, .unsigned), (.number, .double), (.boolean, .bool),
            (.null, .null), (.array, .array):
            return true
        default: return false
        }
    }

    private func describe(_ type: SchemaType) -> String {
        switch type {
        case .string: "a string"
        case .integer: "an integer"
        case .number: "a number"
        case .boolean: "a boolean"
        case .null: "null"
        case .any: "a value"
        case .array: "a list"
        case .named(let name):
            switch definitions[name] {
            case .enumeration: "a string"
            case .object: "an object"
            default: "a value"
            }
        }
    }
}
