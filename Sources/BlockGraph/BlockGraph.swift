import BlockCore
import BlockIO
import QMP

/// All nodes of one ``IOThread``, and what may be done with them. Confined to that thread.
///
/// A process may have several, one for each thread; those that share names, objects and passed files (see
/// ``init(on:besides:)``) can exchange nodes: ``move(_:to:)``. Nodes that edges join are in one graph.
///
/// Nodes live while somebody holds them. Dropping a hold or an edge closes nothing by itself:
/// ``collect()`` closes what nobody holds any more, children after parents, and reports what could
/// not be made durable. Whoever gives up the last use of a node closes that node and what it alone
/// kept below it, and is the one who is told how that went (see ``closeUnheld(_:)``).
public final class BlockGraph: @unchecked Sendable {
    public let thread: IOThread
    public let registry: DriverRegistry
    /// In the order they were opened.
    public private(set) var nodes: [BlockNode] = []
    private var byName: [String: BlockNode] = [:]
    /// Nodes that are off the table and have not been closed yet: as long as storage takes.
    public private(set) var closing: [BlockNode] = []
    /// Names, objects and passed files: also those of the other graphs.
    let commons: GraphCommons
    /// Told when an image turns out to be corrupt while it is in use, once for each node.
    public var corruptionObserver: ((BlockNode, ImageCorruption) -> Void)?
    /// Files that clients opened and passed in.
    public var descriptorSets: DescriptorSets { commons.descriptorSets }
    /// Whether long computations are to be given up: see ``endLongWork()``.
    public var isEnding: Bool { commons.isEnding }
    /// See `OpenTransaction.swift`.
    var isInTransaction = false
    /// Of sections that are drained right now.
    var drains: [DrainSection] = []

    public init(on thread: IOThread, registry: DriverRegistry) {
        self.thread = thread
        self.registry = registry
        commons = GraphCommons()
    }

    /// A graph on another thread, that shares names, objects and passed files with `other`.
    public init(on thread: IOThread, besides other: BlockGraph) {
        self.thread = thread
        registry = other.registry
        commons = other.commons
    }

    /// What only costs processor time, as trying a passphrase does, ends early from now on, with
    /// `cancelled`: the process is about to end. From any thread; for the graphs that share names, too.
    public func endLongWork() { commons.end() }

    public func node(named name: String) -> BlockNode? { byName[name] }

    /// - Throws: `notFound`.
    public func requireNode(named name: String) throws(BlockError) -> BlockNode {
        guard let node = byName[name] else {
            guard commons.graph(ofNode: name) == nil else {
                throw BlockError(.busy, "the node is on another I/O thread", node: name)
            }
            throw BlockError(.notFound, "there is no node '\(name)'")
        }
        guard node.isReady else { throw BlockError(.busy, "the node is being opened", node: name) }
        return node
    }

    // MARK: Open

    /// Opens a node and its children from options, as `blockdev-add` takes them.
    ///
    /// - Parameters:
    ///   - options: `driver`, generic options, the driver's own, children by name: a node's name,
    ///     options to open one, or null.
    ///   - monitorOwned: the monitor holds it, until `blockdev-del`; it must have a `node-name` then.
    /// - Throws: with everything closed again that was opened on the way.
    public func open(
        _ options: JSONValue, monitorOwned: Bool = false,
        inheriting inherited: NodeOptions = NodeOptions()
    ) async throws(BlockError) -> BlockNode {
        thread.preconditionOnThread()
        let node = try await openUnheld(
            options, inheriting: inherited, needsName: monitorOwned, nesting: 0, depth: 0)
        node.isMonitorOwned = monitorOwned
        if !monitorOwned { node.hold("opening") }
        return node
    }

    func openUnheld(
        _ options: JSONValue, inheriting inherited: NodeOptions, needsName: Bool, nesting: Int,
        depth: Int, above: NodeOpening? = nil, isNamedAbove: Bool = false
    ) async throws(BlockError) -> BlockNode {
        guard nesting < Limits.jsonDepthMax else {
            throw BlockError(.exhausted, "node options nest deeper than \(Limits.jsonDepthMax)")
        }
        guard depth < Limits.graphDepthMax else {
            throw BlockError(
                .exhausted, "the chain of nodes is deeper than \(Limits.graphDepthMax)")
        }
        let reader = try OptionReader(options, of: "the node")
        guard let driverName = try reader.string("driver") else {
            throw BlockError(
                .invalidArgument, "option 'driver' is missing",
                remedy: "name the format or protocol, as in driver=qcow2")
        }
        let description = try registry.driver(named: driverName)
        let name = try name(from: reader, needsName: needsName)
        // Errors name the node themselves.
        reader.subject = "driver '\(driverName)'"
        let nodeOptions: NodeOptions
        do throws(BlockError) {
            nodeOptions = try NodeOptions(reading: reader, inheriting: inherited)
        } catch {
            throw error.on(node: name)
        }
        let node = BlockNode(
            name: name, graph: self, description: description, options: nodeOptions)
        // Known from here on, so that nothing else takes the name while it opens.
        try commons.take(name, for: self)
        if case .object(let given) = options { node.openedWith = given }
        nodes.append(node)
        byName[name] = node
        node.hold("opening")
        do throws(BlockError) {
            let opening = NodeOpening(
                node: node, options: reader, nesting: nesting, depth: depth, above: above,
                isNamedAbove: isNamedAbove)
            let driver = try await description.open(opening)
            node.setDriver(driver)
            try reader.finish()
            let transaction = GraphTransaction(self)
            transaction.refresh(node)
            try transaction.commit()
        } catch {
            node.release("opening")
            // Why it did not open says more than how its children closed.
            try? await closeUnheld([node])
            throw error.on(node: name)
        }
        node.release("opening")
        return node
    }

    private func name(
        from reader: OptionReader, needsName: Bool
    ) throws(BlockError) -> String {
        guard let name = try reader.string("node-name") else {
            if needsName {
                throw BlockError(
                    .invalidArgument, "option 'node-name' is missing",
                    remedy: "name the node, so that it can be referred to")
            }
            return commons.automaticName()
        }
        guard Self.isValidName(name) else {
            throw BlockError(
                .invalidArgument, "'\(name)' is no valid node name",
                remedy: "begin with a letter, go on with letters, digits, '-', '.', '_'; "
                    + "\(Limits.nodeNameLengthMax) characters at most")
        }
        guard commons.graph(ofNode: name) == nil else {
            throw BlockError(.alreadyExists, "there is a node '\(name)' already")
        }
        return name
    }

    /// A letter, then letters, digits, `-`, `.`, `_`.
    static func isValidName(_ name: String) -> Bool {
        let bytes = Array(name.utf8)
        guard let first = bytes.first, bytes.count <= Limits.nodeNameLengthMax else { return false }
        func isLetter(_ byte: UInt8) -> Bool { (byte | 0x20) >= 0x61 && (byte | 0x20) <= 0x7a }
        return isLetter(first)
            && bytes.allSatisfy { byte in
                isLetter(byte) || (byte >= 0x30 && byte <= 0x39)
                    || byte == 0x2d || byte == 0x2e || byte == 0x5f
            }
    }

    // MARK: Moves; see `GraphMove.swift`

    /// Takes nodes that go to another graph off the tables.
    func forget(_ leaving: Set<ObjectIdentifier>) {
        for node in nodes where leaving.contains(ObjectIdentifier(node)) { byName[node.name] = nil }
        nodes.removeAll { leaving.contains(ObjectIdentifier($0)) }
    }

    /// Takes in nodes that came from another graph, and the drains that they are in.
    func arrive(_ component: [BlockNode], _ sections: [DrainSection]) {
        thread.preconditionOnThread()
        nodes += component
        for node in component { byName[node.name] = node }
        drains += sections
    }

    // MARK: Users

    /// Makes `user` a user of `node`.
    ///
    /// - Throws: `permissionDenied` where it conflicts with another user.
    public func attach(
        _ user: any NodeUser, to node: BlockNode, as name: String = "root", _ access: Access
    ) throws(BlockError) -> Edge {
        let transaction = GraphTransaction(self)
        do throws(BlockError) {
            let edge = try transaction.attach(node, to: .user(user), as: name, access: access)
            try transaction.commit()
            return edge
        } catch {
            transaction.abort()
            throw error
        }
    }

    /// A user is about to leave and waits for its requests: from here to its ``detach(_:)`` no driver
    /// below holds requests back.
    public func beginDetach(_ edge: Edge) {
        guard edge.drainedForDetach.isEmpty else { return }
        edge.drainedForDetach = edge.node.nodesBelow.filter(\.isOpen).map(\.driver)
        for driver in edge.drainedForDetach { driver.drainBegins() }
    }

    /// Ends a use, once its requests are done, and closes what nobody holds any more.
    public func detach(_ edge: Edge) async throws(BlockError) {
        if edge.inFlight > 0 {
            // Nothing that holds requests back keeps a user that leaves.
            beginDetach(edge)
            await edge.untilIdle()
        }
        for driver in edge.drainedForDetach { driver.drainEnds() }
        edge.drainedForDetach = []
        let node = edge.node
        let transaction = GraphTransaction(self)
        transaction.detach(edge)
        // Giving up a use conflicts with nothing.
        try transaction.commit()
        try await closeUnheld([node])
    }

    /// Drops the monitor's hold.
    ///
    /// - Throws: `busy`, naming the users, while there are any.
    public func remove(_ node: BlockNode) async throws(BlockError) {
        try await finish(try beginRemoval(of: node))
    }

    /// Nodes that nobody finds any more and that are still to be closed.
    public struct Removal: Sendable {
        fileprivate let nodes: [BlockNode]
    }

    /// ``remove(_:)`` up to where it may have to wait for storage; ``finish(_:)`` is the rest.
    public func beginRemoval(of node: BlockNode) throws(BlockError) -> Removal {
        guard node.isMonitorOwned else {
            throw BlockError(
                .permissionDenied, "the node belongs to its parent, not to the monitor",
                remedy: "remove the parent", node: node.name)
        }
        guard node.parents.isEmpty else {
            throw BlockError(
                .busy,
                "the node is in use by "
                    + node.parents.map(\.parentDescription).joined(separator: ", "),
                remedy: "remove its users first", node: node.name)
        }
        node.isMonitorOwned = false
        return Removal(nodes: takeUnheld([node]))
    }

    /// Closes what was removed, and what it alone kept.
    ///
    /// - Throws: the first failure to make something durable; everything is closed all the same.
    public func finish(_ removal: Removal) async throws(BlockError) {
        thread.preconditionOnThread()
        try await close(removal.nodes)
    }

    // MARK: Close

    /// Closes every node that nobody holds, parents before children.
    ///
    /// - Throws: the first failure to make something durable; everything is closed all the same.
    public func collect() async throws(BlockError) {
        thread.preconditionOnThread()
        try await closeUnheld(nodes)
    }

    /// Closes those of `candidates` that nobody holds, and what they alone held below them, parents
    /// before children. All are closed on return, and their failures are this caller's, whoever else
    /// closes nodes meanwhile.
    ///
    /// - Throws: the first failure to make something durable; everything is closed all the same.
    func closeUnheld(_ candidates: [BlockNode]) async throws(BlockError) {
        try await close(takeUnheld(candidates))
    }

    private func close(_ taken: [BlockNode]) async throws(BlockError) {
        var failure: BlockError?
        var rest = taken
        while !rest.isEmpty {
            let node = rest.removeFirst()
            if node.isOpen {
                do throws(BlockError) {
                    try await node.flushBeforeClosing()
                } catch {
                    failure = failure ?? error.on(node: node.name)
                }
                do throws(BlockError) {
                    try await node.driver.close()
                } catch {
                    failure = failure ?? error.on(node: node.name)
                }
            }
            let children = node.children.map(\.node)
            let transaction = GraphTransaction(self)
            for edge in node.children { transaction.detach(edge) }
            do throws(BlockError) {
                try transaction.commit()
            } catch {
                failure = failure ?? error
            }
            node.letGo()
            closing.removeAll { $0 === node }
            rest += takeUnheld(children)
        }
        if let failure { throw failure }
    }

    /// Takes those that nobody holds out of the table: nobody finds them, or closes them, from here on.
    private func takeUnheld(_ candidates: [BlockNode]) -> [BlockNode] {
        var taken: [BlockNode] = []
        for node in candidates where !node.isHeld && byName[node.name] === node {
            nodes.removeAll { $0 === node }
            byName[node.name] = nil
            commons.letGo(node.name)
            // It stays on this thread until it is closed.
            node.hold("closing")
            taken.append(node)
        }
        closing += taken
        return taken
    }

    /// Drops the monitor's holds and closes all that is not used: at the end of the process.
    public func closeAll() async throws(BlockError) {
        for node in nodes { node.isMonitorOwned = false }
        try await collect()
    }
}

extension BlockNode {
    /// Keeps the node alive for `reason`, as queries show it.
    public func hold(_ reason: String) {
        temporaryHolds[reason, default: 0] += 1
    }

    /// Drops a hold; ``BlockGraph/collect()`` closes the node when it was the last.
    public func release(_ reason: String) {
        guard let count = temporaryHolds[reason] else { return }
        temporaryHolds[reason] = count > 1 ? count - 1 : nil
    }
}
