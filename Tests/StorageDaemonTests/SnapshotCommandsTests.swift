import BlockCore
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Snapshots inside images over QMP, and their export.
@Suite struct SnapshotCommandsTests {
    static let server = ["--nbd-server", "addr.type=unix,addr.path=$/nbd"]

    /// A daemon's client, with a qcow2 image as node `disk`, exported to be written as `disk`.
    private func withDisk(
        _ body: (MonitoredDaemon, RawQMPClient) async throws -> Void
    ) async throws {
        try await MonitoredDaemon.with(Self.server) { daemon in
            try BitmapCommandsTests.shell([
                "qemu-img", "create", "-q", "-f", "qcow2", "\(daemon.folder)/a.qcow2", "4M",
            ])
            let client = try daemon.client()
            try client.execute(
                "blockdev-add",
                [
                    "driver": "qcow2", "node-name": "disk", "discard": "unmap",
                    "file": ["driver": "file", "filename": .string("\(daemon.folder)/a.qcow2")],
                ])
            try export("disk", writable: true, client)
            try await body(daemon, client)
        }
    }

    private func export(_ node: String, writable: Bool, _ client: RawQMPClient) throws {
        try client.execute(
            "block-export-add",
            [
                "type": "nbd", "id": .string(node), "node-name": .string(node),
                "writable": .bool(writable),
            ])
    }

    private func io(_ daemon: MonitoredDaemon, _ name: String, _ commands: String...) throws {
        let uri = BitmapCommandsTests.uri(daemon.folder, name)
        let output = try BitmapCommandsTests.shell(
            ["qemu-io", "-f", "raw"] + (name == "view" ? ["-r"] : [])
                + commands.flatMap { ["-c", $0] } + [uri])
        #expect(!output.contains("failed"), "\(output)")
    }

    private func snapshots(_ client: RawQMPClient) throws -> [String] {
        guard case .array(let nodes) = try client.execute("query-named-block-nodes") else {
            return []
        }
        let disk = nodes.first { $0["node-name"] == "disk" }
        guard case .array(let list)? = disk?["image"]?["snapshots"] else { return [] }
        return list.compactMap { value in
            guard case .string(let name)? = value["name"] else { return nil }
            return name
        }
    }

    @Test func aSnapshotIsExportedWhileTheDiskIsWritten() async throws {
        try await withDisk { daemon, client in
            try io(daemon, "disk", "write -P 1 0 2M")
            try client.execute(
                "blockdev-snapshot-internal-sync", ["device": "disk", "name": "monday"])
            try io(daemon, "disk", "write -P 2 0 4M", "flush")
            try client.execute(
                "blockdev-snapshot-internal-sync", ["device": "disk", "name": "tuesday"])
            #expect(try snapshots(client) == ["monday", "tuesday"])
            try client.execute(
                "blockdev-add",
                [
                    "driver": "snapshot-access", "node-name": "view", "file": "disk",
                    "snapshot-name": "monday",
                ])
            try export("view", writable: false, client)
            try io(daemon, "view", "read -P 1 0 2M", "read -P 0 2M 2M")
            try io(daemon, "disk", "read -P 2 0 4M", "discard 0 4M")
            let deleted = try client.execute(
                "blockdev-snapshot-delete-internal-sync", ["device": "disk", "name": "tuesday"])
            #expect(deleted["name"] == "tuesday" && deleted["id"] == "2")
            let refusal = try client.refusal(
                "blockdev-snapshot-delete-internal-sync", ["device": "disk", "id": "1"])
            #expect(refusal.contains("node 'view'"), "\(refusal)")
            try io(daemon, "view", "read -P 1 0 2M", "read -P 0 2M 2M")
            try client.execute("block-export-del", ["id": "view", "mode": "hard"])
            try client.execute("blockdev-del", ["node-name": "view"])
            try client.execute(
                "blockdev-snapshot-delete-internal-sync", ["device": "disk", "id": "1"])
            #expect(try snapshots(client) == [])
        }
    }

    @Test func aSnapshotOfAnOverlayKeepsItsBackingImage() async throws {
        try await MonitoredDaemon.with(Self.server) { daemon in
            let base = "\(daemon.folder)/base.qcow2"
            let path = "\(daemon.folder)/a.qcow2"
            for arguments in [
                ["qemu-img", "create", "-q", "-f", "qcow2", base, "4M"],
                ["qemu-io", "-c", "write -P 1 0 4M", base],
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path],
                ["qemu-io", "-c", "write -P 2 1M 64k", path],
                ["qemu-img", "snapshot", "-c", "one", path],
            ] { try BitmapCommandsTests.shell(arguments) }
            let client = try daemon.client()
            try client.execute(
                "blockdev-add",
                [
                    "driver": "qcow2", "node-name": "base",
                    "file": ["driver": "file", "filename": .string(base)],
                ])
            try client.execute(
                "blockdev-add",
                [
                    "driver": "qcow2", "node-name": "disk", "backing": "base",
                    "file": ["driver": "file", "filename": .string(path)],
                ])
            try export("disk", writable: true, client)
            try client.execute(
                "blockdev-add",
                [
                    "driver": "snapshot-access", "node-name": "view", "file": "disk",
                    "snapshot-name": "one",
                ])
            try export("view", writable: false, client)
            let reads = ["read -P 1 0 1M", "read -P 2 1M 64k", "read -P 1 2M 2M"]
            try io(daemon, "view", reads[0], reads[1], reads[2])
            // Neither does the view need the export of the disk, nor may the backing image change.
            try client.execute("block-export-del", ["id": "disk", "mode": "hard"])
            try io(daemon, "view", reads[0], reads[1], reads[2])
            let refusal = try client.refusal(
                "block-export-add",
                ["type": "nbd", "id": "base", "node-name": "base", "writable": true])
            #expect(refusal.contains("does not share"), "\(refusal)")
            try client.execute("block-export-del", ["id": "view", "mode": "hard"])
            try client.execute("blockdev-del", ["node-name": "view"])
        }
    }

    @Test func whatCannotBeIsRefused() async throws {
        try await withDisk { daemon, client in
            try client.execute(
                "blockdev-snapshot-internal-sync", ["device": "disk", "name": "s"])
            let cases: [(String, JSONValue, String)] = [
                ("blockdev-snapshot-internal-sync", ["device": "disk", "name": "s"], "already"),
                ("blockdev-snapshot-internal-sync", ["device": "disk", "name": ""], "empty"),
                ("blockdev-snapshot-internal-sync", ["device": "none", "name": "x"], "'none'"),
                ("blockdev-snapshot-delete-internal-sync", ["device": "disk"], "'id' or 'name'"),
                (
                    "blockdev-snapshot-delete-internal-sync",
                    ["device": "disk", "name": "s", "id": "7"], "'7'"
                ),
                (
                    "blockdev-add",
                    [
                        "driver": "snapshot-access", "node-name": "v", "file": "disk",
                        "snapshot-id": "9",
                    ], "'9'"
                ),
            ]
            for (command, arguments, part) in cases {
                let refusal = try client.refusal(command, arguments)
                #expect(refusal.contains(part), "\(refusal)")
            }
            #expect(try snapshots(client) == ["s"])
        }
    }

    @Test func aTransactionThatFailsTakesItsSnapshotBack() async throws {
        try await withDisk { daemon, client in
            try io(daemon, "disk", "write -P 1 0 1M")
            func action(_ name: String) -> JSONValue {
                [
                    "type": "blockdev-snapshot-internal-sync",
                    "data": ["device": "disk", "name": .string(name)],
                ]
            }
            _ = try client.refusal(
                "transaction", ["actions": [action("a"), ["type": "abort", "data": [:]]]])
            #expect(try snapshots(client) == [])
            try client.execute("transaction", ["actions": [action("b")]])
            #expect(try snapshots(client) == ["b"])
        }
    }
}
