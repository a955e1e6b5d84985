import BlockCore
import BlockIO

// Moves nodes from one thread to another: from the graph there to the graph here.
//
//     check      every driver and user of the component says whether it can follow
//     drain      no request is in flight; those that come wait
//     leave      on the old thread, at one go: out of the tables, files and sockets to the new thread,
//                the seats of all tasks last: from there on nothing of the component runs here
//     arrive     on the new thread: into the tables, then users go on
//
// A component is all that edges join, directly or not: it is on one thread as a whole.

extension BlockNode {
    /// The node and all that it is joined to.
    public var component: [BlockNode] {
        DrainSection.closure(of: [self]) { node in
            node.children.map(\.node) + node.parents.compactMap(\.parentNode)
        }
    }
}

extension BlockGraph {
    /// The graph that has a node of this name, this one or another that shares names with it.
    public func graph(ofNode name: String) -> BlockGraph? { commons.graph(ofNode: name) }

    /// A node that is about to be joined to nodes of this graph. From another graph it is moved here, with
    /// all that it is joined to.
    ///
    /// - Throws: also when it cannot be moved.
    public func fetchNode(named name: String) async throws(BlockError) -> BlockNode {
        thread.preconditionOnThread()
        if let other = commons.graph(ofNode: name), other !== self {
            try await other.thread.visit { () throws(BlockError) in
                try await other.move(try other.requireNode(named: name), to: self)
            }
        }
        return try requireNode(named: name)
    }

    /// Moves a node of this graph, and all that it is joined to, to another graph and its thread. Requests
    /// wait meanwhile, and go on there.
    ///
    /// - Throws: `busy`, naming what cannot move and why; nothing has moved then.
    public func move(_ node: BlockNode, to other: BlockGraph) async throws(BlockError) {
        thread.preconditionOnThread()
        precondition(commons === other.commons, "these graphs know nothing of each other")
        guard other !== self else { return }
        let component = node.component
        try checkMove(of: component, for: node)
        let section = await beginDrain(component)
        do throws(BlockError) {
            // What came while the requests ended.
            try checkMove(of: component, for: node)
        } catch {
            endDrain(section)
            throw error
        }
        let drain = section.drain
        let sections = leave(component, for: other)
        drains.removeAll { $0 === section }
        try await other.thread.visit { () throws(BlockError) in
            other.arrive(component, sections)
            other.endDrain(drain)
        }
    }

    private func checkMove(
        of component: [BlockNode], for node: BlockNode
    ) throws(BlockError) {
        let users = component.flatMap { $0.parents.filter(\.isRoot) }
        let mayHold = Set(users.map(\.parentDescription) + [Self.transactionHold])
        for member in component {
            do throws(BlockError) {
                guard member.isReady else { throw BlockError(.busy, "it is being opened") }
                if let holder = member.temporaryHolds.keys.first(where: { !mayHold.contains($0) }) {
                    throw BlockError(.busy, "it is held by \(holder)")
                }
                let isAwaited = drains.contains { section in
                    section.isWaiting && section.around.contains { $0 === member }
                }
                guard !isAwaited else {
                    throw BlockError(
                        .busy, "another command waits for requests to it to end",
                        remedy: "wait for that command")
                }
                try member.driver.checkMove(with: component)
                for edge in member.parents {
                    if case .user(let user) = edge.parent { try user.checkMove(with: component) }
                }
            } catch {
                throw BlockError(
                    error.code,
                    "'\(node.name)' cannot move to another I/O thread: node '\(member.name)': "
                        + error.message, remedy: error.remedy, node: node.name)
            }
        }
    }

    /// - Returns: the drains that the component is in.
    private func leave(_ component: [BlockNode], for other: BlockGraph) -> [DrainSection] {
        let leaving = Set(component.map(ObjectIdentifier.init))
        let sections = drains.map { section in
            section.split { leaving.contains(ObjectIdentifier($0)) }
        }
        forget(leaving)
        var seats: [IOSeat] = []
        for node in component {
            node.driver.moves(to: other.thread)
            for edge in node.parents {
                if case .user(let user) = edge.parent { seats += user.moves(to: other.thread) }
            }
            seats.append(node.seat)
            node.join(other)
        }
        commons.move(component, to: other)
        for seat in seats { seat.move(to: other.thread) }
        return sections
    }
}
