import BlockCore
import BlockIO
import QMP
import Testing

@testable import BlockGraph
@testable import StorageDaemon

/// Commands that hold users back, while a request is in flight that storage does not answer.
@Suite struct HeldUsersTests {
    private final class Notes: @unchecked Sendable {
        var order: [String] = []
    }

    /// What the guest's export uses.
    private static func guestEdge(_ test: TestDaemon) throws(BlockError) -> Edge {
        guard let edge = test.daemon.exports.first?.export.edge else {
            throw BlockError(.notFound, "no guest export")
        }
        return edge
    }

    /// Starts a command, and notes how it ends.
    private static func start(
        _ command: String, _ arguments: JSONValue, _ test: TestDaemon, _ notes: Notes
    ) -> Task<Void, Never> {
        let daemon = test.daemon
        return daemon.thread.spawn {
            do throws(BlockError) {
                _ = try await daemon.execute(command, arguments)
                notes.order.append("command")
            } catch { notes.order.append(error.code == .cancelled ? "cancelled" : "\(error)") }
        }
    }

    /// What other clients do meanwhile.
    private static func useOthers(_ test: TestDaemon) async throws(BlockError) {
        let daemon = test.daemon
        _ = try await daemon.execute("query-named-block-nodes", [:])
        _ = try await daemon.execute(
            "blockdev-add", ["driver": "null-co", "node-name": "another"])
        _ = try await daemon.execute("blockdev-del", ["node-name": "another"])
    }

    private static let waiting: [(String, JSONValue)] = [
        (
            "transaction",
            [
                "actions": [
                    ["type": "blockdev-add", "data": ["driver": "null-co", "node-name": "new"]]
                ]
            ]
        ),
        (
            "blockdev-reopen",
            ["options": [["driver": "null-co", "node-name": "other", "size": 1_048_576]]]
        ),
        (
            "blockdev-replace",
            ["parent-type": "export", "export-id": "guest", "new-child": "other"]
        ),
    ]

    @Test(arguments: Self.waiting)
    func othersGoOnWhileACommandWaitsForARequest(
        command: String, arguments: JSONValue
    ) async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            _ = try await test.daemon.execute(
                "blockdev-add",
                ["driver": "null-co", "node-name": "other", "size": .integer(TestDaemon.size)])
            let edge = try Self.guestEdge(test)
            await edge.enter()
            let task = Self.start(command, arguments, test, notes)
            try await Self.useOthers(test)
            notes.order.append("others")
            edge.leave()
            await task.value
            // Nobody is held back any more.
            try await test.guestWrite(0, 4096, 1)
        }
        #expect(notes.order == ["others", "command"])
    }

    @Test func othersGoOnWhileADiskIsResized() async throws {
        let notes = Notes()
        let size = try await TestDaemon.run { test throws(BlockError) in
            let graph = test.daemon.graph
            _ = try await test.daemon.execute(
                "block-export-del", ["id": "guest", "mode": "hard"])
            let node = try graph.requireNode(named: "disk")
            // Whoever comes now waits.
            let section = await graph.beginDrain([node])
            let task = Self.start(
                "block_resize", ["node-name": "disk", "size": 2_097_152], test, notes)
            try await Self.useOthers(test)
            notes.order.append("others")
            graph.endDrain(section)
            await task.value
            return node.size
        }
        #expect(notes.order == ["others", "command"])
        #expect(size == 2_097_152)
    }

    @Test func aTransactionHoldsBackWhomOthersAddMeanwhile() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            let edge = try Self.guestEdge(test)
            await edge.enter()
            let task = Self.start("transaction", ["actions": []], test, notes)
            _ = try await daemon.execute(
                "blockdev-add", ["driver": "null-co", "node-name": "late", "size": 512])
            let late = try daemon.graph.attach(
                NamedUser("late"), to: try daemon.graph.requireNode(named: "late"), .read)
            await late.enter()
            edge.leave()
            try await Self.useOthers(test)
            notes.order.append("others")
            late.leave()
            await task.value
            try await daemon.graph.detach(late)
        }
        #expect(notes.order == ["others", "command"])
    }

    @Test func anIdleThreadGoesWhileACommandWaits() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            _ = try await test.daemon.execute("object-add", ["qom-type": "iothread", "id": "idle"])
            let edge = try Self.guestEdge(test)
            await edge.enter()
            let task = Self.start("transaction", ["actions": []], test, notes)
            _ = try await test.daemon.execute("object-del", ["id": "idle"])
            notes.order.append("others")
            edge.leave()
            await task.value
            try await test.guestWrite(0, 4096, 1)
        }
        #expect(notes.order == ["others", "command"])
    }

    @Test func othersGoOnWhileACommandWaitsForACopyThatNoRequestWaitsForAnyMore() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            let size = JSONValue.integer(TestDaemon.size)
            _ = try await daemon.execute(
                "blockdev-add",
                [
                    "driver": "null-co", "node-name": "slow", "size": size,
                    "latency-ns": 3_000_000_000,
                ])
            _ = try await daemon.execute(
                "blockdev-add",
                [
                    "driver": "copy-before-write", "node-name": "cbw", "file": "disk",
                    "target": "slow", "cbw-timeout": 1,
                ])
            _ = try await daemon.execute(
                "blockdev-replace",
                ["parent-type": "export", "export-id": "guest", "new-child": "cbw"])
            do throws(BlockError) {
                try await test.guestWrite(0, 4096, 1)
                notes.order.append("written")
            } catch {}
            let task = Self.start("transaction", ["actions": []], test, notes)
            try await Self.useOthers(test)
            notes.order.append("others")
            await task.value
        }
        #expect(notes.order == ["others", "command"])
    }

    @Test func aCommandThatHasNotBegunWhenTheDaemonEndsDoesNotBegin() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            try await daemon.close()
            let options: JSONValue = ["driver": "null-co", "node-name": "late"]
            await Self.start("blockdev-add", options, test, notes).value
        }
        #expect(notes.order == ["cancelled"])
    }

    @Test func theDaemonEndsAlthoughACommandWaits() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            let edge = try Self.guestEdge(test)
            await edge.enter()
            let task = Self.start("transaction", ["actions": []], test, notes)
            let held = daemon.thread.spawn {
                if let data = try? IOVector(allocating: 512) { try? await edge.read(0, into: data) }
                notes.order.append("held back")
            }
            let end = daemon.thread.spawn {
                try? await daemon.close()
                notes.order.append("end")
            }
            await held.value
            edge.leave()
            await task.value
            await end.value
        }
        #expect(notes.order.first == "held back")
        #expect(Set(notes.order) == ["held back", "cancelled", "end"])
    }
}
