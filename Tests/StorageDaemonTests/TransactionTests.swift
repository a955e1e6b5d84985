import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import QMP
import Testing

@testable import StorageDaemon

/// Transactions that fail: everything is as it was.
@Suite struct TransactionTests {
    private static let target: JSONValue = [
        "type": "blockdev-add",
        "data": ["driver": "null-co", "node-name": "temp", "size": .integer(TestDaemon.size)],
    ]
    private static let filter: JSONValue = [
        "type": "blockdev-add",
        "data": [
            "driver": "copy-before-write", "node-name": "filter", "file": "disk", "target": "temp",
        ],
    ]
    private static let access: JSONValue = [
        "type": "blockdev-add",
        "data": ["driver": "snapshot-access", "node-name": "frozen", "file": "filter"],
    ]
    private static let export: JSONValue = [
        "type": "block-export-add",
        "data": ["type": "nbd", "id": "frozen", "node-name": "frozen"],
    ]
    private static let abort: JSONValue = ["type": "abort", "data": [:]]

    private static func guest(on node: String) -> JSONValue {
        [
            "type": "blockdev-replace",
            "data": [
                "parent-type": "export", "export-id": "guest", "new-child": .string(node),
            ],
        ]
    }

    /// - Returns: why it failed.
    private static func run(
        _ actions: [JSONValue], _ test: TestDaemon
    ) async throws(BlockError) -> String? {
        do throws(BlockError) {
            _ = try await test.daemon.execute("transaction", ["actions": .array(actions)])
            return nil
        } catch { return error.description }
    }

    @Test func aSnapshotThatFailsAtTheEndIsUndoneFromThere() async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            let failure = try await Self.run(
                [
                    Self.target, Self.filter, Self.guest(on: "filter"), Self.access, Self.export,
                    Self.abort,
                ], test)
            let below = test.daemon.exports.map { $0.export.edge?.node.name }
            try await test.guestWrite(0, 4096, 1)
            return (failure, below, test.nodeNames())
        }
        #expect(seen.0?.contains("aborted") == true)
        #expect(seen.0?.contains("undone") == false)
        #expect(seen.1 == ["disk"])
        #expect(seen.2 == ["disk"])
    }

    @Test func anExportThatIsUndoneIsNotToldOf() async throws {
        let told = try await TestDaemon.run { test throws(BlockError) in
            var told: [JSONValue] = []
            test.daemon.emit = { name, data in told.append([.string(name), data]) }
            let export: JSONValue = [
                "type": "block-export-add",
                "data": ["type": "nbd", "id": "more", "node-name": "disk", "name": "more"],
            ]
            _ = try await Self.run([export, Self.abort], test)
            return (told, test.daemon.exports.map(\.identifier))
        }
        #expect(told.0 == [])
        #expect(told.1 == ["guest"])
    }

    @Test func aSnapshotWhoseEndIsAbortedIsAsItWas() async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            _ = try await Self.run([Self.target, Self.filter, Self.guest(on: "filter")], test)
            let failure = try await Self.run([Self.guest(on: "disk"), Self.abort], test)
            try await test.guestWrite(0, TestDaemon.size, 0x22)
            let node = try test.daemon.graph.requireNode(named: "filter")
            let filter = node.driver as? CopyBeforeWrite
            return (failure != nil, filter?.breakage == nil, filter?.copiedBytes)
        }
        #expect(seen.0 && seen.1)
        #expect(seen.2 == TestDaemon.size)
    }

    @Test func aSnapshotThatATransactionTakesOutIsBroken() async throws {
        let breakage = try await TestDaemon.run { test throws(BlockError) in
            _ = try await Self.run([Self.target, Self.filter, Self.guest(on: "filter")], test)
            _ = try await Self.run([Self.guest(on: "disk")], test)
            let node = try test.daemon.graph.requireNode(named: "filter")
            return (node.driver as? CopyBeforeWrite)?.breakage?.description
        }
        #expect(breakage?.contains("last user") == true)
    }

    /// The commit of the transaction comes before the requests of guests.
    @Test func guestsGoOnAfterATransactionThatFailed() async throws {
        let done = try await TestDaemon.run { test throws(BlockError) in
            for _ in 0..<20 {
                let writing = test.daemon.thread.spawn {
                    for value in UInt8(1)..<9 { try? await test.guestWrite(0, 4096, value) }
                }
                _ = try await Self.run(
                    [
                        Self.target, Self.filter, Self.guest(on: "filter"), Self.access,
                        Self.export, Self.abort,
                    ], test)
                await writing.value
            }
            return test.nodeNames()
        }
        #expect(done == ["disk"])
    }
}
