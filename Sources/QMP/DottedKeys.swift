import BlockCore

extension JSONValue {
    /// Objects with dots in their keys, as `json:{…}` names of images may have them, nested:
    /// `{"file.filename": "x"}` is `{"file": {"filename": "x"}}`. Whole numbers between dots are places
    /// in a list.
    ///
    /// - Throws: `invalidArgument` for an option that is a value and a group, gaps in a list, and too much
    ///   nesting.
    public func nestingDottedKeys() throws(BlockError) -> JSONValue {
        switch self {
        case .array(let values):
            var result: [JSONValue] = []
            for value in values { result.append(try value.nestingDottedKeys()) }
            return .array(result)
        case .object(let object):
            guard object.members.contains(where: { $0.key.contains(".") }) else {
                var result = JSONObject()
                for (key, value) in object.members { result[key] = try value.nestingDottedKeys() }
                return .object(result)
            }
            let root = OptionBranch()
            for (key, value) in object.members { try root.insert(value, atDotted: key) }
            return try root.value()
        default:
            return self
        }
    }
}

extension OptionBranch {
    fileprivate func insert(_ value: JSONValue, atDotted key: String) throws(BlockError) {
        let names = key.split(separator: ".", omittingEmptySubsequences: false).map(String.init)
        guard names.count <= Limits.jsonDepthMax, !names.contains("") else {
            throw BlockError(.invalidArgument, "'\(key)' is no name of an option")
        }
        var branch = self
        for (level, name) in names.enumerated() {
            if level > 0, Int(name) != nil { branch.hasPlaces = true }
            branch = try branch.groupMember(name, of: key)
        }
        // An object's members stand beside those that come with dots.
        let nested = try value.nestingDottedKeys()
        if case .object(let object) = nested, !object.isEmpty {
            for (name, value) in object.members {
                try branch.groupMember(name, of: key).set(value, key)
            }
        } else {
            try branch.set(nested, key)
        }
    }

    /// - Parameter key: as it was given, for errors.
    private func groupMember(_ name: String, of key: String) throws(BlockError) -> OptionBranch {
        guard leaf == nil else { throw Self.mixed(key) }
        return member(name)
    }

    private func set(_ value: JSONValue, _ key: String) throws(BlockError) {
        guard leaf == nil, !hasMembers else { throw Self.mixed(key) }
        leaf = value
    }

    private static func mixed(_ key: String) -> BlockError {
        BlockError(.invalidArgument, "option '\(key)' is given twice, or as a value and a group")
    }
}
