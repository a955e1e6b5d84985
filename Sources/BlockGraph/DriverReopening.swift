import BlockCore
import QMP

/// What a driver has at hand while its node is made ready to go on with other options.
public final class NodeReopening {
    public let node: BlockNode
    /// The node's options from then on. A driver may make it read-only where `auto-read-only` allows
    /// that, and the storage does not allow more.
    public var nodeOptions: NodeOptions
    /// The driver's own options, complete: what is not there goes back to its default. Children are
    /// taken care of.
    public let options: OptionReader
    let given: JSONObject
    /// Children that come, change places or go.
    var childChanges: [ChildChange] = []
    /// Of its children that take part.
    var childSteps: [NodeReopening] = []

    enum ChildChange {
        case attach(BlockNode, name: String, roles: ChildRole)
        case replace(Edge, BlockNode)
        case detach(Edge)
    }

    init(
        _ node: BlockNode, _ given: JSONObject, inheriting inherited: NodeOptions
    ) throws(BlockError) {
        self.node = node
        self.given = given
        options = try OptionReader(.object(given), of: "driver '\(node.description.name)'")
        do throws(BlockError) {
            if let driver = try options.string("driver"), driver != node.description.name {
                throw BlockError(
                    .invalidArgument,
                    "its driver is '\(node.description.name)' and stays so, it cannot become '\(driver)'"
                )
            }
            if let name = try options.string("node-name"), name != node.name {
                throw BlockError(.invalidArgument, "a node cannot be named '\(name)' anew")
            }
            nodeOptions = try NodeOptions(reading: options, inheriting: inherited)
        } catch {
            throw error.on(node: node.name)
        }
        nodeOptions.isUntrusted = node.options.isUntrusted
    }

    /// Whether the child `name` will be read-only.
    public func isReadOnlyThen(child name: String) -> Bool {
        for case .replace(let edge, let node) in childChanges where edge.name == name {
            return node.isReadOnly
        }
        guard let child = node.child(named: name)?.node else { return false }
        return childSteps.first { $0.node === child }?.nodeOptions.isReadOnly ?? child.isReadOnly
    }

    /// Whether an own option differs from what the node was opened with.
    public func isChanged(_ key: String) -> Bool {
        switch (given[key], node.openedWith[key]) {
        case (nil, nil): false
        case (let new?, let old?): !new.means(old)
        default: true
        }
    }

    /// Says of an own option that it stays as it is.
    ///
    /// - Throws: `unsupported` when it is to change.
    public func requireUnchanged(_ key: String) throws(BlockError) {
        _ = try options.value(key)
        guard isChanged(key) else { return }
        throw BlockError(
            .unsupported, "option '\(key)' cannot change while it is open",
            remedy: given[key] == nil
                ? "give it as when it was opened" : "open another node, and put it in its place",
            node: node.name)
    }

    /// Says of all own options that they stay as they are.
    public func requireAllUnchanged() throws(BlockError) {
        for (key, _) in given.members + node.openedWith.members where isOwn(key) {
            try requireUnchanged(key)
        }
    }

    /// Neither every node's, nor a child.
    private func isOwn(_ key: String) -> Bool {
        !NodeOptions.keys.contains(key) && key != "driver" && key != "node-name"
            && !isChild(key)
    }

    func isChild(_ key: String) -> Bool {
        node.child(named: key) != nil || (key == "backing" && node.description.supportsBacking)
    }
}

/// A driver's part of a reopening: made ready beforehand, carried out at the instant of all.
public struct DriverReopening {
    /// Takes the place of the node's driver, which is not closed: it has written everything out.
    public var driver: (any BlockDriver)?
    /// Puts the options into force. Between two requests, and it cannot fail.
    public var commit: () -> Void = {}
    /// Lets go of what was made ready: another node refused.
    public var abort: () async -> Void = {}
    /// Lets go of what is not needed any more, after the commit.
    public var finish: () async -> Void = {}

    public init() {}
}

extension BlockDriver {
    public func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening {
        try reopening.requireAllUnchanged()
        return DriverReopening()
    }
}

extension JSONValue {
    /// Whether both say the same, one of them perhaps as `key=value` text.
    func means(_ other: JSONValue) -> Bool {
        if self == other { return true }
        switch (self, other) {
        case (.object(let left), .object(let right)):
            return left.count == right.count
                && left.members.allSatisfy { right[$0.key].map($0.value.means) ?? false }
        case (.array(let left), .array(let right)):
            return left.count == right.count && zip(left, right).allSatisfy { $0.means($1) }
        default:
            guard let left = plainText, let right = other.plainText else { return false }
            return left == right
                || SizeText.parse(left).map { $0 == SizeText.parse(right) } ?? false
        }
    }

    /// As it is written on command lines.
    private var plainText: String? {
        switch self {
        case .string("yes"), .string("true"): "on"
        case .string("no"), .string("false"): "off"
        case .string(let text): text
        case .bool(let value): value ? "on" : "off"
        case .integer(let value): String(value)
        default: nil
        }
    }
}
