import BlockCore
import BlockGraph

// Commands that change the graph while its users are held back wait until no request is in flight, which storage
// may put off for ever. They wait aside, so that other commands run meanwhile:
//
//     turn    users are held back; nothing is in flight: go on ──────────────────────▶ the change itself
//       │                                                                           ▲
//       ╰─▶ aside, without the turn: requests end ─▶ turn: others may have changed ─╯
//                                                    the graph: hold users once more

/// Users that are held back for a command, which may be waiting for their requests. Confined to the main thread.
final class HeldUsers {
    let drain = Drain()
    /// They were let go: the daemon ends.
    var isCancelled = false
}

extension StorageDaemon {
    /// Carries out a part of a command for which users are held back, once no request of theirs is in flight.
    /// Other commands run until then.
    ///
    /// - Parameters:
    ///   - nodes: whose users, in each graph. Called on its thread, and again after other commands have run.
    ///   - body: finds the graph as those left it: what a name stands for it looks up for itself. What holds the
    ///     users back is the drain that it is given.
    /// - Throws: `cancelled` when the daemon ends first.
    func holdingUsers<T>(
        of nodes: (BlockGraph) -> [BlockNode],
        _ body: (Drain) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let held = HeldUsers()
        heldUsers.append(held)
        let result: Result<T, BlockError>
        do throws(BlockError) {
            try await hold(held, nodes)
            result = .success(try await body(held.drain))
        } catch {
            result = .failure(error)
        }
        heldUsers.removeAll { $0 === held }
        // The threads may be gone by then.
        if !held.isCancelled { try await onEachThread { graph in graph.endDrain(held.drain) } }
        return try result.get()
    }

    private func hold(
        _ held: HeldUsers, _ nodes: (BlockGraph) -> [BlockNode]
    ) async throws(BlockError) {
        while true {
            // One graph at a time: threads come and go while other commands run.
            var busy: BlockGraph?
            try await onEachThread { graph in
                if !graph.holdUsers(of: nodes(graph), as: held.drain) { busy = busy ?? graph }
            }
            guard let busy else { return }
            try await aside { () throws(BlockError) in
                try await busy.thread.visit { () throws(BlockError) in
                    await busy.untilIdle(held.drain)
                }
            }
            guard !held.isCancelled else {
                throw BlockError(.cancelled, "the daemon ends; requests were still in flight")
            }
        }
    }

    /// Carries out a part of a command while other commands run.
    func aside<T>(
        _ body: () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let descriptors = callerDescriptors
        asideCount += 1
        turns.pass()
        let result: Result<T, BlockError>
        do throws(BlockError) {
            result = .success(try await body())
        } catch {
            result = .failure(error)
        }
        asideCount -= 1
        asideEnded.wake()
        await turns.take()
        callerDescriptors = descriptors
        return try result.get()
    }

    /// The daemon ends: whoever waits for requests gives up, and lets go of the users.
    func letHeldUsersGo() async throws(BlockError) {
        let all = heldUsers
        for held in all { held.isCancelled = true }
        try await onEachThread { graph in
            for held in all { graph.endDrain(held.drain) }
        }
    }

    /// Returns when nothing runs beside the commands any more.
    func untilNothingIsAside() async {
        while asideCount > 0 { await asideEnded.wait() }
    }
}
