import BlockCore
import BlockIO
import QMP

/// What a driver has at hand while its node opens.
public final class NodeOpening {
    public let node: BlockNode
    /// The driver's own options; what it does not read is reported as unknown.
    public let options: OptionReader
    /// How deep the node stands in options that were given as one.
    private let nesting: Int
    /// How many nodes are being opened above it.
    private let depth: Int
    /// What opens the node as a child.
    private let above: NodeOpening?
    /// The image above names it: no option does.
    private let isNamedAbove: Bool

    public var graph: BlockGraph { node.graph }
    public var thread: IOThread { node.thread }

    init(
        node: BlockNode, options: OptionReader, nesting: Int, depth: Int,
        above: NodeOpening? = nil, isNamedAbove: Bool = false
    ) {
        self.node = node
        self.options = options
        self.nesting = nesting
        self.depth = depth
        self.above = above
        self.isNamedAbove = isNamedAbove
    }

    /// Opens or refers to the child that option `name` describes.
    ///
    /// - Parameters:
    ///   - fallback: options to open the child with when the option is not there.
    /// - Returns: `nil` when the option is null, or not there and there is no fallback.
    public func child(
        _ name: String, roles: ChildRole, fallback: JSONValue? = nil
    ) async throws(BlockError) -> Edge? {
        let given = try options.value(name)
        guard let value = given ?? fallback else { return nil }
        let child: BlockNode
        var isOpenedHere = false
        switch value {
        case .null:
            return nil
        case .string(let reference):
            child = try await node.graph.fetchNode(named: reference)
        default:
            isOpenedHere = true
            child = try await node.graph.openUnheld(
                value, inheriting: node.options.inherited(by: roles), needsName: false,
                // What an image says of the next one is nested in nothing.
                nesting: given == nil ? 0 : nesting + 1, depth: depth + 1, above: self,
                isNamedAbove: given == nil)
        }
        let transaction = GraphTransaction(node.graph)
        do throws(BlockError) {
            if roles.contains(.primary) { try checkLoop(child) }
            let edge = try transaction.attach(child, to: .node(node), as: name, roles: roles)
            try transaction.commit()
            if isOpenedHere { child.openedFor = edge }
            return edge
        } catch {
            transaction.abort()
            if isOpenedHere { try? await node.graph.closeUnheld([child]) }
            throw error
        }
    }

    /// Images whose names of backing files lead back to one of them would be opened again and again.
    ///
    /// Names lead on without end only through an image that is opened twice and goes by the name that it
    /// has both times. Options are finite: an image whose options say what its backing image is, or that
    /// there is none, may be there again.
    ///
    /// - Parameter child: what the node's own image is in.
    private func checkLoop(_ child: BlockNode) throws(BlockError) {
        guard above != nil, try followsItsName, child.isOpen else { return }
        let place = child.place
        var isNamed = isNamedAbove
        // Of the image whose name led here.
        var namer: StoragePlace?
        var next = above
        while let opening = next {
            if isNamed, opening.node.description.supportsBacking, let file = opening.node.file?.node
            {
                let other = file.place
                let nearest = namer ?? other
                namer = nearest
                if opening.node.description.name == node.description.name,
                    other.isSame(as: place), try opening.followsItsName
                {
                    throw .backingLoop(
                        place.node.driver.filename, namedBy: nearest.node.driver.filename,
                        isItself: nearest.isSame(as: place))
                }
            }
            isNamed = isNamed || opening.isNamedAbove
            next = opening.above
        }
    }

    /// Whether the image itself says what its backing image is: no option does.
    private var followsItsName: Bool {
        get throws(BlockError) {
            guard node.description.supportsBacking else { return false }
            return try options.value("backing") == nil
        }
    }

    /// ``child(_:roles:fallback:)`` for a child that must be there.
    public func requiredChild(
        _ name: String, roles: ChildRole
    ) async throws(BlockError) -> Edge {
        guard let edge = try await child(name, roles: roles) else {
            throw BlockError(
                .invalidArgument, "option '\(name)' is missing",
                remedy: "give a node's name, or options to open one")
        }
        return edge
    }
}

/// Where the bytes of a node begin.
private struct StoragePlace {
    /// A node of storage, or of a driver whose bytes are nowhere as they are.
    let node: BlockNode
    let offset: Int

    func isSame(as other: StoragePlace) -> Bool {
        guard offset == other.offset else { return false }
        if node === other.node || node.driver.isSameStorage(as: other.node.driver) { return true }
        // An image in an image.
        guard node.description.name == other.node.description.name,
            let file = node.file?.node, let otherFile = other.node.file?.node
        else { return false }
        return file.place.isSame(as: otherFile.place)
    }
}

extension BlockNode {
    /// Below all that hands the bytes on, or some of them. The node is open.
    fileprivate var place: StoragePlace {
        var node = self
        var offset = 0
        while let below = node.description.kind == .filter
            ? node.filteredChild.map({ (edge: $0, offset: 0) }) : node.driver.shownChild
        {
            node = below.edge.node
            // Each was checked against what is below it, and one that wrapped is only another place.
            offset &+= below.offset
        }
        return StoragePlace(node: node, offset: offset)
    }
}

/// What a driver has at hand while it makes an image.
public final class ImageCreation: NodeUser {
    public let graph: BlockGraph
    /// The driver's creation options, as `blockdev-create` names them.
    public let options: OptionReader
    private var targets: [Edge] = []
    private var prepare: (() async throws(BlockError) -> Void)?

    public var thread: IOThread { graph.thread }
    public let userDescription = "image creation"

    /// - Parameter prepare: makes the storage that the targets are opened on. Called once, before the
    ///   first of them: drivers look at all their options first, so that what stands there is not given
    ///   up for options that are refused.
    public init(
        _ graph: BlockGraph, options: OptionReader,
        prepare: (() async throws(BlockError) -> Void)? = nil
    ) {
        self.graph = graph
        self.options = options
        self.prepare = prepare
    }

    /// The storage to make the image in: a node's name, or options to open one.
    ///
    /// - Throws: also when the node may not be written and resized.
    public func target(_ name: String) async throws(BlockError) -> Edge {
        guard let value = try options.value(name) else {
            throw BlockError(
                .invalidArgument, "option '\(name)' is missing", remedy: "name the node to write to"
            )
        }
        if let prepare {
            self.prepare = nil
            try await prepare()
        }
        var isOpenedHere = false
        let node: BlockNode
        if case .string(let reference) = value {
            node = try graph.requireNode(named: reference)
        } else {
            node = try await graph.open(value)
            isOpenedHere = true
        }
        defer { if isOpenedHere { node.release("opening") } }
        do throws(BlockError) {
            let edge = try graph.attach(
                self, to: node, as: name,
                Access(uses: [.consistentRead, .write, .resize], shares: []))
            targets.append(edge)
            return edge
        } catch {
            if isOpenedHere {
                isOpenedHere = false
                node.release("opening")
                try? await graph.closeUnheld([node])
            }
            throw error
        }
    }

    /// Flushes nothing; lets go of the targets. Called by whoever started the creation.
    ///
    /// - Throws: the first failure to close one; all are let go all the same.
    public func finish() async throws(BlockError) {
        let leaving = targets
        targets = []
        var failure: BlockError?
        for edge in leaving {
            do throws(BlockError) {
                try await graph.detach(edge)
            } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
    }
}

extension BlockError {
    /// Following the names of backing files comes back to an image.
    ///
    /// - Parameters:
    ///   - name: of that image.
    ///   - above: the image that names it.
    public static func backingLoop(
        _ name: String, namedBy above: String, isItself: Bool
    ) -> BlockError {
        BlockError(
            .corrupt,
            isItself
                ? "the image '\(above)' names itself as its backing file"
                : "the backing chain is a loop: '\(above)' names '\(name)', which is above it",
            remedy: "give another backing file, or none, with 'rebase -u'")
    }
}
