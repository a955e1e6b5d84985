import BlockCore

/// Something that options of nodes refer to by its identifier, and that several nodes may share.
public protocol GraphObject: AnyObject, Sendable {
    /// Who uses it now, as errors name them.
    var users: [String] { get }
}

extension BlockGraph {
    /// - Throws: `alreadyExists`.
    public func addObject(
        _ object: any GraphObject, as identifier: String
    ) throws(BlockError) {
        guard objects[identifier] == nil else {
            throw BlockError(.alreadyExists, "there is an object '\(identifier)' already")
        }
        objects[identifier] = object
    }

    /// - Throws: `busy`, naming the users, while there are any.
    public func removeObject(_ identifier: String) throws(BlockError) {
        if let users = objects[identifier]?.users, !users.isEmpty {
            throw BlockError(
                .busy, "object '\(identifier)' is in use by \(users.joined(separator: ", "))",
                remedy: "remove its users first")
        }
        objects[identifier] = nil
    }
}
