/// What a node needs of its children when its driver has no opinion of its own.
public enum DefaultAccess {
    /// - Parameters:
    ///   - roles: what the child is to the node.
    ///   - isWritable: the node was opened to be written.
    ///   - users: what the node's own users do and allow.
    public static func access(roles: ChildRole, isWritable: Bool, for users: Access) -> Access {
        if roles.contains(.filtered) { return users }
        if roles.contains(.cow) {
            // Overlays see the backing data through theirs: it must not change under them, unless
            // the users of the node agree that it may.
            var shares: Permission = [.consistentRead, .writeUnchanged]
            if users.shares.contains(.write) { shares.formUnion([.write, .resize]) }
            return Access(uses: users.uses.intersection(.consistentRead), shares: shares)
        }
        if roles.contains(.metadata) {
            // Metadata is read whatever the users do, and written when the node may be; nobody else
            // can make sense of it while that goes on.
            return Access(
                uses: isWritable ? [.consistentRead, .write, .resize] : .consistentRead,
                shares: users.shares.subtracting([.write, .resize]))
        }
        return Access(
            uses: users.uses.union(users.uses.contains(.writeUnchanged) ? .write : []),
            shares: users.shares)
    }
}

extension BlockDriver {
    public func access(to edge: Edge, for users: Access) -> Access {
        DefaultAccess.access(
            roles: edge.roles, isWritable: edge.parentNode.map { !$0.isReadOnly } ?? false,
            for: users)
    }
}
