import BlockCore

/// Something that options of nodes refer to by its identifier, and that several nodes may share. From any
/// thread.
public protocol GraphObject: AnyObject, Sendable {
    /// Who uses it now, as errors name them.
    var users: [String] { get }
}

extension BlockGraph {
    /// The object of that name, for all graphs that share it.
    public func object(_ identifier: String) -> (any GraphObject)? { commons.object(identifier) }

    /// - Throws: `alreadyExists`.
    public func addObject(
        _ object: any GraphObject, as identifier: String
    ) throws(BlockError) {
        try commons.add(object, as: identifier)
    }

    /// - Throws: `busy`, naming the users, while there are any.
    public func removeObject(_ identifier: String) throws(BlockError) {
        if let users = commons.object(identifier)?.users, !users.isEmpty {
            throw BlockError(
                .busy, "object '\(identifier)' is in use by \(users.joined(separator: ", "))",
                remedy: "remove its users first")
        }
        commons.remove(identifier)
    }
}
