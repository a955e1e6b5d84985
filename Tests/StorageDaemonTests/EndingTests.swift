import BlockCore
import BlockGraph
import BlockIO
import QMP
import Testing

@testable import StorageDaemon

/// Exports and nodes that are removed while storage holds a request of theirs back.
@Suite struct EndingTests {
    /// A disk whose requests take 1.5 s: three times what a command waits.
    private static func addSlowDisk(_ test: TestDaemon) async throws(BlockError) {
        _ = try await test.daemon.execute(
            "blockdev-add",
            [
                "driver": "null-co", "node-name": "slow", "size": .integer(TestDaemon.size),
                "latency-ns": 1_500_000_000,
            ])
        _ = try await test.daemon.execute(
            "block-export-add",
            ["type": "nbd", "id": "slow", "node-name": "slow", "writable": true])
    }

    private final class Notes: @unchecked Sendable {
        var events: [String] = []
        var order: [String] = []
    }

    @Test func othersGoOnWhileAnExportsRequestIsHeldBack() async throws {
        let notes = Notes()
        let states = try await TestDaemon.run { test throws(BlockError) in
            try await Self.addSlowDisk(test)
            let daemon = test.daemon
            daemon.emit = { name, data in notes.events.append(name) }
            guard let edge = daemon.exports.last?.export.edge else { return JSONValue.null }
            let request = daemon.thread.spawn {
                if let data = try? IOVector(allocating: 512) { try? await edge.read(0, into: data) }
                notes.order.append("request")
            }
            let removal = daemon.thread.spawn {
                _ = try? await daemon.execute("block-export-del", ["id": "slow", "mode": "hard"])
                notes.order.append("removal")
            }
            // Behind the removal in the queue of commands.
            _ = try await daemon.execute(
                "blockdev-add", ["driver": "null-co", "node-name": "new"])
            notes.order.append("other")
            await removal.value
            let states = try await daemon.execute("query-block-exports", [:])
            #expect(notes.events.isEmpty)
            do throws(BlockError) {
                _ = try await daemon.execute("block-export-del", ["id": "slow", "mode": "hard"])
                Issue.record("it was removed twice")
            } catch { #expect(error.code == .busy) }
            await request.value
            while daemon.exports.count > 1 { await daemon.thread.yield() }
            return states
        }
        #expect(notes.order == ["other", "removal", "request"])
        #expect(notes.events.first == "BLOCK_EXPORT_DELETED")
        guard case .array(let exports) = states else {
            Issue.record("\(states)")
            return
        }
        let expected: JSONValue = [
            "id": "slow", "type": "nbd", "node-name": "slow", "shutting-down": true,
        ]
        #expect(exports.last == expected)
    }

    @Test func othersGoOnWhileANodeWaitsForItsTarget() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            _ = try await daemon.execute(
                "blockdev-add",
                [
                    "driver": "null-co", "node-name": "slow", "size": .integer(TestDaemon.size),
                    "latency-ns": 4_000_000_000,
                ])
            _ = try await daemon.execute(
                "blockdev-add",
                [
                    "driver": "copy-before-write", "node-name": "filter", "file": "disk",
                    "target": "slow", "cbw-timeout": 1, "on-cbw-error": "break-snapshot",
                ])
            let guest: (String) -> JSONValue = { node in
                ["parent-type": "export", "export-id": "guest", "new-child": .string(node)]
            }
            _ = try await daemon.execute("blockdev-replace", guest("filter"))
            try await test.guestWrite(0, 4096, 1)
            _ = try await daemon.execute("blockdev-replace", guest("disk"))
            let removal = daemon.thread.spawn {
                _ = try? await daemon.execute("blockdev-del", ["node-name": "filter"])
                notes.order.append("removal")
            }
            _ = try await daemon.execute("query-named-block-nodes", ["flat": true])
            notes.order.append("other")
            await removal.value
            #expect(daemon.graph.closing.map(\.name) == ["filter"])
            // The target is still used.
            do throws(BlockError) {
                _ = try await daemon.execute("blockdev-del", ["node-name": "slow"])
                Issue.record("the target was removed under a copy")
            } catch { #expect(error.code == .busy) }
            while !daemon.graph.closing.isEmpty {
                await daemon.thread.sleep(nanoseconds: 10_000_000)
            }
            _ = try await daemon.execute("blockdev-del", ["node-name": "slow"])
        }
        #expect(notes.order == ["other", "removal"])
    }

    @Test func theDaemonEndsAfterWhatItRemoves() async throws {
        let notes = Notes()
        try await TestDaemon.run { test throws(BlockError) in
            try await Self.addSlowDisk(test)
            let daemon = test.daemon
            daemon.emit = { name, data in notes.events.append(name) }
            guard let edge = daemon.exports.last?.export.edge else { return }
            daemon.thread.spawn {
                if let data = try? IOVector(allocating: 512) { try? await edge.read(0, into: data) }
                notes.order.append("request")
            }
            _ = try await daemon.execute("nbd-server-stop", [:])
            #expect(notes.order.isEmpty)
            try await daemon.close()
            #expect(notes.order == ["request"])
            #expect(daemon.exports.isEmpty && daemon.graph.nodes.isEmpty)
        }
        #expect(notes.events == ["BLOCK_EXPORT_DELETED", "BLOCK_EXPORT_DELETED"])
    }

    @Test func anExportWithWritethroughWritesDurably() async throws {
        let flags = try await TestDaemon.run { test throws(BlockError) in
            for (name, isThrough) in [("through", true), ("back", false)] {
                _ = try await test.daemon.execute(
                    "block-export-add",
                    [
                        "type": "nbd", "id": .string(name), "node-name": "disk",
                        "name": .string(name), "writable": true, "writethrough": .bool(isThrough),
                    ])
            }
            return test.daemon.exports.map { $0.export.edge?.isWriteThrough }
        }
        #expect(flags == [false, true, false])
    }

    @Test(arguments: ["", "9", "a/b", "ä", "-x"]) func identifiersAreWellFormed(
        identifier: String
    ) async throws {
        let refusals = try await TestDaemon.run { test throws(BlockError) in
            var refusals: [String] = []
            let name = JSONValue.string(identifier)
            let attempts: [(String, JSONValue)] = [
                (
                    "block-export-add",
                    ["type": "nbd", "id": name, "node-name": "disk", "name": "x"]
                ),
                (
                    "blockdev-create",
                    [
                        "job-id": name,
                        "options": ["driver": "file", "filename": "/none/disk", "size": 512],
                    ]
                ), ("object-add", ["qom-type": "secret", "id": name, "data": "x"]),
            ]
            for (command, arguments) in attempts {
                do throws(BlockError) {
                    _ = try await test.daemon.execute(command, arguments)
                    refusals.append("\(command) took it")
                } catch { refusals.append(error.description) }
            }
            return refusals
        }
        for refusal in refusals { #expect(refusal.contains("no valid identifier"), "\(refusal)") }
    }

    @Test func queriesTellWhoHoldsANode() async throws {
        let holders = try await TestDaemon.run { test throws(BlockError) in
            guard
                case .array(let nodes) = try await test.daemon.execute(
                    "query-named-block-nodes", [:])
            else { return JSONValue.null }
            let jobs = try await test.daemon.execute("query-block-jobs", [:])
            #expect(jobs == .array([]))
            return nodes.first { $0["node-name"] == "disk" }?["x-holders"] ?? .null
        }
        let expected: JSONValue = ["monitor", "NBD export 'disk'"]
        #expect(holders == expected)
    }
}
