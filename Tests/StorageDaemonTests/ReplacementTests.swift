import BlockCore
import BlockExports
import BlockGraph
import BlockIO
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// What may take a child's place.
@Suite struct ReplacementTests {
    /// A qcow2 node `top` in the file node `disk`; `other` is another file of the same size.
    private static func withImage<T: Sendable>(
        _ body: @escaping @Sendable (TestDaemon) async throws(BlockError) -> T
    ) async throws -> T {
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            _ = try await daemon.execute("block-export-del", ["id": "guest", "mode": "hard"])
            _ = try await daemon.execute(
                "blockdev-create",
                [
                    "job-id": "j",
                    "options": ["driver": "qcow2", "file": "disk", "size": 1_048_576],
                ])
            await daemon.jobs.first?.task?.value
            _ = try await daemon.execute(
                "blockdev-add", ["driver": "qcow2", "node-name": "top", "file": "disk"])
            _ = try await daemon.execute(
                "blockdev-add", ["driver": "null-co", "node-name": "other", "size": 1_048_576])
            return try await body(test)
        }
    }

    private static func refusal(
        _ test: TestDaemon, _ command: String, _ arguments: JSONValue
    ) async -> String? {
        do throws(BlockError) {
            _ = try await test.daemon.execute(command, arguments)
            return nil
        } catch { return error.description }
    }

    private static func replace(_ child: String) -> JSONValue {
        [
            "parent-type": "driver", "node-name": "top", "child": "file",
            "new-child": .string(child),
        ]
    }

    @Test func theFileOfAnImageIsNotReplacedByAnother() async throws {
        let refusals = try await Self.withImage { test throws(BlockError) in
            [
                await Self.refusal(test, "blockdev-replace", Self.replace("other")),
                await Self.refusal(
                    test, "blockdev-reopen",
                    ["options": [["driver": "qcow2", "node-name": "top", "file": "other"]]]),
            ]
        }
        for refusal in refusals {
            #expect(refusal?.contains("does not have the bytes of 'disk'") == true, "\(refusals)")
        }
    }

    @Test func aFilterTakesTheFilesPlaceAndLeavesItAgain() async throws {
        let data = try await Self.withImage { test throws(BlockError) in
            let daemon = test.daemon
            _ = try await daemon.execute(
                "blockdev-add",
                ["driver": "preallocate", "node-name": "filter", "file": "disk"])
            let edge = try daemon.graph.attach(
                NamedUser("test"), to: try daemon.graph.requireNode(named: "top"),
                Access(uses: [.consistentRead, .write], shares: .all))
            let data = try IOVector(allocating: 65536)
            data.fill(5)
            try await edge.write(0, from: data)
            let filtered = await Self.refusal(test, "blockdev-replace", Self.replace("filter"))
            #expect(filtered == nil)
            data.fill(6)
            try await edge.write(65536, from: data)
            let plain = await Self.refusal(test, "blockdev-replace", Self.replace("disk"))
            #expect(plain == nil)
            try await daemon.graph.detach(edge)
            return (try await test.read("top"))
        }
        #expect(data == [0, 5, 6])
    }

    @Test(arguments: ["blockdev-replace", "transaction"])
    func anImageIsWrittenOutBeforeItsFileIsReplaced(command: String) async throws {
        let copied = try await Self.withImage { test throws(BlockError) in
            let daemon = test.daemon
            _ = try await daemon.execute(
                "blockdev-add",
                ["driver": "preallocate", "node-name": "filter", "file": "disk"])
            let edge = try daemon.graph.attach(
                NamedUser("test"), to: try daemon.graph.requireNode(named: "top"),
                Access(uses: [.consistentRead, .write], shares: .all))
            let data = try IOVector(allocating: 65536)
            data.fill(5)
            try await edge.write(0, from: data)
            let action: JSONValue = ["type": "blockdev-replace", "data": Self.replace("filter")]
            let arguments: JSONValue =
                command == "transaction" ? ["actions": [action]] : Self.replace("filter")
            _ = try await daemon.execute(command, arguments)
            let copy = "\(test.folder)/temp"
            try? FileManager.default.copyItem(atPath: "\(test.folder)/disk", toPath: copy)
            _ = try await daemon.execute(
                "blockdev-add",
                [
                    "driver": "qcow2", "node-name": "copy", "read-only": true,
                    "file": ["driver": "file", "filename": .string(copy)],
                ])
            let copied = try await test.read("copy")
            try await daemon.graph.detach(edge)
            return copied
        }
        #expect(copied == [0, 5])
    }

    @Test func clientsKeepTheSizeThatTheyWereTold() async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            _ = try await test.daemon.execute(
                "blockdev-add", ["driver": "null-co", "node-name": "long", "size": 4_194_304])
            let arguments: JSONValue = [
                "parent-type": "export", "export-id": "guest", "new-child": "long",
            ]
            guard let export = test.daemon.exports.first?.export else { return ("", 0) }
            let thread = test.daemon.thread
            let client = try await Socket.connect(
                to: .unix(path: "\(test.folder)/nbd.sock"), on: thread)
            _ = try await NBDRemoteServer.use("disk", on: client)
            while export.connectionCount == 0 { await thread.sleep(nanoseconds: 1_000_000) }
            let refusal = await Self.refusal(test, "blockdev-replace", arguments)
            client.close()
            while export.connectionCount > 0 { await thread.sleep(nanoseconds: 1_000_000) }
            // Nobody is there: the next client is told the new size.
            _ = try await test.daemon.execute("blockdev-replace", arguments)
            return (refusal ?? "", export.edge?.size ?? 0)
        }
        #expect(seen.0.contains("does not share resizing"))
        #expect(seen.1 == 4_194_304)
    }
}
