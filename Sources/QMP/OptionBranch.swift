import BlockCore

/// A value, a group or a list of options while its members arrive.
final class OptionBranch {
    /// `nil`: members make it.
    var leaf: JSONValue?
    /// Members are places in a list.
    var hasPlaces = false
    private var members: [(key: String, branch: OptionBranch)] = []
    private var index: [String: Int] = [:]

    var hasMembers: Bool { !members.isEmpty }

    /// The member of that name, made when there is none yet.
    func member(_ key: String) -> OptionBranch {
        if let place = index[key] { return members[place].branch }
        let branch = OptionBranch()
        index[key] = members.count
        members.append((key, branch))
        return branch
    }

    /// All of it.
    ///
    /// - Parameter path: its name, for errors.
    /// - Throws: `invalidArgument` for gaps in a list.
    func value(path: String = "") throws(BlockError) -> JSONValue {
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
            guard let found = index[String(place)] else {
                throw BlockError(
                    .invalidArgument, "the list '\(path)' has no place \(place)",
                    remedy: "number places from 0 without gaps, and name nothing beside them")
            }
            values.append(try members[found].branch.value(path: "\(path).\(place)"))
        }
        return .array(values)
    }
}
