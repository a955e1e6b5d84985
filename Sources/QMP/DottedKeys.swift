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
            let root = DottedBranch()
            for (key, value) in object.members { try root.insert(value, at: key, whole: key) }
            return try root.value(path: "")
        default:
            return self
        }
    }
}

/// A value or an object while its members arrive.
private final class DottedBranch {
    private var leaf: JSONValue?
    private var members: [(key: String, branch: DottedBranch)] = []
    private var hasPlaces = false

    /// - Parameter whole: the key as it was given, for errors.
    func insert(_ value: JSONValue, at key: String, whole: String) throws(BlockError) {
        let names = key.split(separator: ".", omittingEmptySubsequences: false).map(String.init)
        guard names.count <= Limits.jsonDepthMax, !names.contains("") else {
            throw BlockError(.invalidArgument, "'\(whole)' is no name of an option")
        }
        var branch = self
        for (level, name) in names.enumerated() {
            if level > 0, Int(name) != nil { branch.hasPlaces = true }
            branch = try branch.member(name, whole)
        }
        // An object's members stand beside those that come with dots.
        let nested = try value.nestingDottedKeys()
        if case .object(let object) = nested, !object.isEmpty {
            for (key, value) in object.members {
                try branch.member(key, whole).set(value, whole)
            }
        } else {
            try branch.set(nested, whole)
        }
    }

    private func member(_ key: String, _ whole: String) throws(BlockError) -> DottedBranch {
        guard leaf == nil else { throw Self.mixed(whole) }
        if let found = members.first(where: { $0.key == key }) { return found.branch }
        let branch = DottedBranch()
        members.append((key, branch))
        return branch
    }

    private func set(_ value: JSONValue, _ whole: String) throws(BlockError) {
        guard leaf == nil, members.isEmpty else { throw Self.mixed(whole) }
        leaf = value
    }

    private static func mixed(_ key: String) -> BlockError {
        BlockError(.invalidArgument, "option '\(key)' is given twice, or as a value and a group")
    }

    func value(path: String) throws(BlockError) -> JSONValue {
        if let leaf { return leaf }
        if hasPlaces { return try list(path: path) }
        var object = JSONObject()
        for (key, branch) in members {
            object[key] = try branch.value(path: path.isEmpty ? key : "\(path).\(key)")
        }
        return .object(object)
    }

    private func list(path: String) throws(BlockError) -> JSONValue {
        var values: [JSONValue] = []
        for place in members.indices {
            guard let found = members.first(where: { $0.key == String(place) }) else {
                throw BlockError(
                    .invalidArgument, "the list '\(path)' has no place \(place)",
                    remedy: "number places from 0 without gaps, and name nothing beside them")
            }
            values.append(try found.branch.value(path: "\(path).\(place)"))
        }
        return .array(values)
    }
}
