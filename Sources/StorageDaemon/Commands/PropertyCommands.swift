import BlockCore
import BlockFilters
import QMP

// Properties of objects, read and changed while they are in use: the limits of throttle groups.

extension StorageDaemon {
    /// `qom-get`.
    func qomGet(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-get")
        let (group, property) = try throttleProperty(reader)
        try reader.finish()
        let limits = group.limits.json
        if property == "limits" { return limits }
        guard property.hasPrefix("x-"), let value = limits[String(property.dropFirst(2))] else {
            throw unknownProperty(property, of: group)
        }
        return value
    }

    /// `qom-set`. Members of `limits` that are not given stay.
    func qomSet(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "qom-set")
        let (group, property) = try throttleProperty(reader)
        let value = try reader.value("value") ?? .null
        try reader.finish()
        var limits = group.limits
        let given = try OptionReader(
            property == "limits" ? value : .object([property: value]),
            of: "object '\(group.identifier)'")
        try limits.take(given, prefix: property == "limits" ? "" : "x-")
        try given.finish()
        try group.setLimits(limits)
        return [:]
    }

    /// The object of `path` (`/objects/ID`, or the identifier alone), and the property's name.
    private func throttleProperty(
        _ reader: OptionReader
    ) throws(BlockError) -> (ThrottleGroup, String) {
        let path = try reader.required("path")
        let property = try reader.required("property")
        let prefix = "/objects/"
        let identifier = path.hasPrefix(prefix) ? String(path.dropFirst(prefix.count)) : path
        switch objects[identifier] {
        case .throttleGroup(let group): return (group, property)
        case nil: throw BlockError(.notFound, "there is no object '\(path)'")
        default:
            throw BlockError(
                .unsupported, "object '\(identifier)' has no property '\(property)' to look at",
                remedy: "throttle groups have 'limits'")
        }
    }

    private func unknownProperty(_ property: String, of group: ThrottleGroup) -> BlockError {
        BlockError(
            .notFound, "object '\(group.identifier)' has no property '\(property)'",
            remedy: "use limits, or x- and the name of one of its members")
    }
}
