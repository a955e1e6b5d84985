/// What a user of a node may do with it, and what it lets others do meanwhile.
///
/// The raw values are those of QEMU's image locks: a bit's number is the lock byte's.
public struct Permission: OptionSet, Hashable, Sendable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Reads see a consistent guest view: everything but the inside of a half-done copy.
    public static let consistentRead = Permission(rawValue: 1)
    /// Change what others read.
    public static let write = Permission(rawValue: 2)
    /// Write what leaves others' view as it is, as copy-on-read does.
    public static let writeUnchanged = Permission(rawValue: 4)
    /// Change the size.
    public static let resize = Permission(rawValue: 8)

    public static let all: Permission = [.consistentRead, .write, .writeUnchanged, .resize]

    /// The single permissions, in the order of their bits.
    public static let each: [(permission: Permission, name: String)] = [
        (.consistentRead, "consistent-read"), (.write, "write"),
        (.writeUnchanged, "write-unchanged"), (.resize, "resize"),
    ]

    /// The names of the permissions in the set, as QMP spells them.
    public var names: [String] {
        Self.each.filter { contains($0.permission) }.map(\.name)
    }
}

/// What a user of a node asks for and allows.
public struct Access: Hashable, Sendable {
    /// What the user does.
    public var uses: Permission
    /// What it lets other users of the node do.
    public var shares: Permission

    public init(uses: Permission, shares: Permission) {
        self.uses = uses
        self.shares = shares
    }

    /// No use, no objection.
    public static let none = Access(uses: [], shares: .all)
    /// A reader that others may write beside.
    public static let read = Access(uses: .consistentRead, shares: .all)
}

/// What a child is to its parent. `file` and `backing` follow from it.
public struct ChildRole: OptionSet, Hashable, Sendable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Holds guest data that reads of the parent return.
    public static let data = ChildRole(rawValue: 1)
    /// Holds the parent's metadata.
    public static let metadata = ChildRole(rawValue: 2)
    /// Holds exactly the data that the parent presents: the child of a filter.
    public static let filtered = ChildRole(rawValue: 4)
    /// Holds what the parent does not (yet): the backing child of copy-on-write.
    public static let cow = ChildRole(rawValue: 8)
    /// The child that stands for the parent's own storage.
    public static let primary = ChildRole(rawValue: 16)

    /// A format's only file: metadata and data.
    public static let image: ChildRole = [.data, .metadata, .primary]
}
