import BlockCore
import BlockFilters
import QMP

// The limits of throttle groups as properties, read and changed while they are in use.

extension ThrottleGroup {
    /// `limits`, or one of its members with `x-` in front.
    func property(_ name: String) throws(BlockError) -> JSONValue {
        if name == "limits" { return limits.json }
        guard name.hasPrefix("x-"), let value = limits.json[String(name.dropFirst(2))] else {
            throw BlockError(
                .invalidArgument, "object '\(identifier)' has no property '\(name)'",
                remedy: "use limits, or x- and the name of one of its members")
        }
        return value
    }

    /// Changes `limits`, of which members that are not given stay, or one member.
    func setProperty(_ name: String, to value: JSONValue) throws(BlockError) {
        var changed = limits
        let given = try OptionReader(
            name == "limits" ? value : .object([name: value]), of: "object '\(identifier)'")
        try changed.take(given, prefix: name == "limits" ? "" : "x-")
        try given.finish()
        try setLimits(changed)
    }
}

extension StorageDaemon {
    /// The throttle group at `path`: `/objects/ID`, or the identifier alone.
    func throttleGroup(at path: String) -> ThrottleGroup? {
        let prefix = "/objects/"
        let identifier = path.hasPrefix(prefix) ? String(path.dropFirst(prefix.count)) : path
        if case .throttleGroup(let group)? = objects[identifier] { return group }
        return nil
    }
}
