import QMP

/// What `--object` and `--chardev` say when they are asked for `help`, or `?`.
enum OptionHelp {
    /// What is asked for: the types of objects, or the properties of one.
    static func objects(_ request: KeyValue.HelpRequest) -> String {
        guard let type = request.subject, DaemonObject.Kind(rawValue: type) != nil,
            case .object(let object)? = StorageDaemon.schema.definitions["ObjectOptions-\(type)"]
        else {
            let types = DaemonObject.Kind.allCases.map(\.rawValue).sorted()
            return listing("List of user creatable objects:", types)
        }
        let lines = object.members.map { "\($0.name)=<\(typeName($0.type))>" }
        return listing("\(type) options:", lines.sorted())
    }

    /// What is asked for: the kinds of character devices, or the options of one.
    static func characterDevices(_ request: KeyValue.HelpRequest) -> String {
        guard let backend = request.subject, let options = CharacterDevices.options[backend] else {
            return listing("Available chardev backend types:", CharacterDevices.backends)
        }
        return listing("\(backend) options:", ["id=<string>"] + options)
    }

    private static func listing(_ title: String, _ lines: [String]) -> String {
        ([title] + lines.map { "  \($0)" }).joined(separator: "\n")
    }

    /// As QEMU's object model names types.
    private static func typeName(_ type: SchemaType) -> String {
        switch type {
        case .string: "string"
        case .integer: "int"
        case .number: "number"
        case .boolean: "bool"
        case .null: "null"
        case .any: "any"
        case .array(let element): typeName(element)
        case .named(let name): name
        }
    }
}
