import BlockCore
import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Dirty bitmaps over QMP and NBD, beside QEMU's storage daemon.
@Suite struct BitmapCommandsTests {
    /// A command or what a client does in between, and what came of it.
    enum Step: Sendable {
        case command(String, JSONValue)
        case write(Int, Int)
        case checksum(String)
        case list
    }

    /// One line for each step that says something: results alone, for messages are each daemon's own.
    static func run(
        _ steps: [Step], _ client: RawQMPClient, _ folder: String
    ) throws -> [String] {
        try steps.enumerated().map { index, step in
            switch step {
            case .command(let command, let arguments):
                do {
                    try client.execute(command, arguments)
                    return "\(index) \(command) done"
                } catch is RawQMPClient.Refused {
                    return "\(index) \(command) refused"
                }
            case .write(let offset, let count):
                try shell(["qemu-io", "-f", "raw", "-c", "write \(offset) \(count)", uri(folder)])
                return "\(index) written"
            case .checksum(let name):
                let result = try client.execute(
                    "x-debug-block-dirty-bitmap-sha256", ["node": "r", "name": .string(name)])
                return "\(index) \(result.text())"
            case .list:
                return "\(index) \(try bitmaps(client))"
            }
        }
    }

    static func uri(_ folder: String, _ name: String = "r") -> String {
        "nbd+unix:///\(name)?socket=\(folder)/nbd"
    }

    @discardableResult
    static func shell(_ arguments: [String]) throws -> String {
        let result = try ChildProgram.run(arguments)
        try #require(result.status == 0, "\(arguments): \(result.errors)")
        return result.output
    }

    /// `dirty-bitmaps` of node `r`, sorted by name and member.
    static func bitmaps(_ client: RawQMPClient) throws -> String {
        guard case .array(let nodes) = try client.execute("query-named-block-nodes"),
            let node = nodes.first(where: { $0["node-name"] == "r" }),
            case .array(let list)? = node["dirty-bitmaps"]
        else { return "none" }
        return list.map { value -> String in
            guard case .object(let object) = value else { return "" }
            return object.members.map { "\($0.key)=\($0.value.text())" }.sorted()
                .joined(separator: ",")
        }.sorted().joined(separator: "; ")
    }

    /// What QEMU's storage daemon answers to the same steps.
    static func runOnQEMU(_ steps: [Step]) throws -> [String] {
        let place = try TemporaryFolder()
        defer { place.remove() }
        let folder = place.path
        _ = FileManager.default.createFile(
            atPath: "\(folder)/disk", contents: Data(count: 1 << 20))
        let daemon = try ChildProgram(
            [
                "qemu-storage-daemon", "--chardev",
                "socket,id=q,path=\(folder)/qmp,server=on,wait=off",
            ]
                + ["--monitor", "q", "--pidfile", "\(folder)/pid"]
                + DaemonTests.exported.map { $0.replacingOccurrences(of: "$", with: folder) })
        defer { daemon.end() }
        for _ in 0..<1000 where !FileManager.default.fileExists(atPath: "\(folder)/pid") {
            usleep(10_000)
        }
        let client = try RawQMPClient("\(folder)/qmp")
        try client.negotiate()
        return try run(steps, client, folder)
    }

    static func expectSameAsQEMU(_ steps: [Step]) async throws {
        let expected = try runOnQEMU(steps)
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let found = try run(steps, try daemon.client(), daemon.folder)
            #expect(found == expected)
        }
    }

    private static func add(
        _ name: String, _ more: JSONObject = [:]
    ) -> Step {
        .command("block-dirty-bitmap-add", .object(arguments(name, more)))
    }

    private static func arguments(_ name: String, _ more: JSONObject = [:]) -> JSONObject {
        var result: JSONObject = ["node": "r", "name": .string(name)]
        for (key, value) in more.members { result[key] = value }
        return result
    }

    private static func on(_ name: String, _ verb: String) -> Step {
        .command("block-dirty-bitmap-\(verb)", .object(arguments(name)))
    }

    private static func merge(_ target: String, _ bitmaps: JSONValue) -> Step {
        .command(
            "block-dirty-bitmap-merge",
            ["node": "r", "target": .string(target), "bitmaps": bitmaps])
    }

    // MARK: Beside QEMU

    @Test func bitmapsRecordWhatQEMUsRecord() async throws {
        try await Self.expectSameAsQEMU([
            Self.add("a"), Self.add("b", ["granularity": 512]),
            Self.add("c", ["granularity": 4096, "disabled": true]), .list,
            .write(0, 100), .write(70_000, 4096), .write(1_048_064, 512), .list,
            .checksum("a"), .checksum("b"), .checksum("c"),
            Self.on("a", "disable"), Self.on("c", "enable"), .write(300_000, 70_000), .list,
            .checksum("a"), .checksum("b"), .checksum("c"),
            Self.merge("a", ["b"]), Self.merge("c", ["a", ["node": "r", "name": "b"]]), .list,
            .checksum("a"), .checksum("b"), .checksum("c"),
            Self.on("b", "clear"), Self.on("a", "remove"), .list, .checksum("b"),
        ])
    }

    @Test func whatQEMURefusesIsRefused() async throws {
        let long = String(repeating: "x", count: 1023)
        try await Self.expectSameAsQEMU([
            Self.add("a"), Self.add("a"), Self.add(""), Self.add(long), Self.add(long + "x"),
            Self.add("g", ["granularity": 1000]), Self.add("g", ["granularity": 256]),
            Self.add("g", ["granularity": 0]), Self.add("g", ["granularity": -512]),
            Self.add("g", ["granularity": 4_294_967_296]),
            Self.add("g", ["granularity": 2_147_483_648]), Self.add("p", ["persistent": true]),
            Self.add("n", ["node": "none"]), Self.on("none", "remove"), Self.on("none", "clear"),
            Self.on("none", "enable"), Self.on("none", "disable"), Self.merge("none", ["a"]),
            Self.merge("a", ["none"]), Self.merge("a", ["a"]),
            Self.merge("a", [["node": "none", "name": "a"]]), .list,
        ])
    }

    @Test func anExportedBitmapIsBusy() async throws {
        func export(_ id: String, _ bitmaps: JSONValue, writable: Bool = true) -> Step {
            .command(
                "block-export-add",
                [
                    "type": "nbd", "id": .string(id), "node-name": "r", "name": .string(id),
                    "writable": .bool(writable), "bitmaps": bitmaps,
                ])
        }
        try await Self.expectSameAsQEMU([
            Self.add("a"), Self.add("off", ["disabled": true]),
            export("x", ["none"]), export("x", ["a"], writable: false),
            export("x", ["a", ["node": "r", "name": "off"]]), .list,
            export("y", ["a"]), Self.on("a", "clear"), Self.on("a", "disable"),
            Self.on("off", "enable"), Self.on("a", "remove"), Self.merge("a", ["off"]), .list,
            .command("block-export-del", ["id": "x"]), .list, Self.on("a", "remove"),
            export("z", ["off"], writable: false), .list,
        ])
    }

    @Test func aTransactionOfBitmapsTakesEffectWholeOrNotAtAll() async throws {
        func action(_ verb: String, _ data: JSONValue) -> JSONValue {
            ["type": .string("block-dirty-bitmap-\(verb)"), "data": data]
        }
        let all: [JSONValue] = [
            action("add", ["node": "r", "name": "new", "granularity": 512]),
            action("merge", ["node": "r", "target": "new", "bitmaps": ["a", "b"]]),
            action("clear", ["node": "r", "name": "a"]),
            action("disable", ["node": "r", "name": "a"]),
            action("enable", ["node": "r", "name": "b"]),
            action("remove", ["node": "r", "name": "c"]),
        ]
        let failing = all + [["type": "abort", "data": [:]]]
        try await Self.expectSameAsQEMU([
            Self.add("a"), Self.add("b", ["granularity": 4096]), Self.add("c"),
            .write(70_000, 4096), Self.on("b", "disable"), .write(500_000, 4096), .list,
            .command("transaction", ["actions": .array(failing)]), .list,
            .checksum("a"), .checksum("b"), .checksum("c"),
            .command("transaction", ["actions": .array(all)]), .list,
            .checksum("a"), .checksum("b"), .checksum("new"),
        ])
    }

    // MARK: Messages

    @Test func aBusyBitmapNamesItsExport() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try daemon.client()
            try client.execute("block-dirty-bitmap-add", ["node": "r", "name": "a"])
            try client.execute(
                "block-export-add",
                [
                    "type": "nbd", "id": "x", "node-name": "r", "name": "x", "writable": true,
                    "bitmaps": ["a"],
                ])
            for verb in ["remove", "clear", "enable", "disable"] {
                let reason = try client.refusal(
                    "block-dirty-bitmap-\(verb)", ["node": "r", "name": "a"])
                #expect(reason.contains("NBD export 'x'"))
            }
        }
    }

    @Test func aBitmapFollowsItsNodeToAnotherSize() async throws {
        try await MonitoredDaemon.with(Array(DaemonTests.exported.prefix(4))) { daemon in
            let client = try daemon.client()
            try client.execute("block-dirty-bitmap-add", ["node": "r", "name": "a"])
            try client.execute("block_resize", ["node-name": "r", "size": 2_097_152])
            // What appeared reads otherwise than an older copy.
            let found1 = try Self.bitmaps(client)
            #expect(found1.contains("count=1048576"))
            try client.execute("block_resize", ["node-name": "r", "size": 65_536])
            let found2 = try Self.bitmaps(client)
            #expect(found2.contains("count=0"))
        }
    }

    // MARK: Contexts

    /// The first writes and exports of the disk with its bitmaps `a`, `b`.
    private func export(_ daemon: MonitoredDaemon) throws -> RawQMPClient {
        let client = try daemon.client()
        try client.execute(
            "block-dirty-bitmap-add", ["node": "r", "name": "a", "granularity": 4096])
        try client.execute("block-dirty-bitmap-add", ["node": "r", "name": "b"])
        try Self.shell(
            [
                "qemu-io", "-f", "raw", "-c", "write 8192 4096", "-c", "write 1M-512 512",
                "-c", "write 70000 10", Self.uri(daemon.folder),
            ].map { $0.replacingOccurrences(of: "1M-512", with: "1048064") })
        try client.execute(
            "block-export-add",
            [
                "type": "nbd", "id": "x", "node-name": "r", "name": "x", "writable": true,
                "bitmaps": ["a", ["node": "r", "name": "b"]],
            ])
        return client
    }

    @Test func clientsSeeWhatIsDirty() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            _ = try export(daemon)
            let uri = Self.uri(daemon.folder, "x")
            let map = try JSONParser.parse(
                try Self.shell(["nbdinfo", "--json", "--map=qemu:dirty-bitmap:a", uri]))
            guard case .array(let extents) = map else { return #expect(Bool(false), "\(map)") }
            #expect(
                extents.map { [$0["offset"], $0["length"], $0["type"]] }
                    == [
                        [0, 8192, 0], [8192, 4096, 1], [12_288, 57_344, 0], [69_632, 4096, 1],
                        [73_728, 970_752, 0], [1_044_480, 4096, 1],
                    ].map { $0.map { .integer($0) } })
            // QEMU's client shows what is dirty as what has no data.
            let image =
                "driver=nbd,export=x,server.type=unix,server.path=\(daemon.folder)/nbd,"
                + "x-dirty-bitmap=qemu:dirty-bitmap:b"
            let json = try JSONParser.parse(
                try Self.shell(["qemu-img", "map", "--output=json", "--image-opts", image]))
            guard case .array(let parts) = json else { return #expect(Bool(false), "\(json)") }
            #expect(
                parts.map { [$0["start"], $0["length"], $0["data"]] } == [
                    [0, 131_072, false], [131_072, 851_968, true], [983_040, 65_536, false],
                ])
        }
    }

    @Test func contextsAreListedAndFoundByTheirPrefix() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            _ = try export(daemon)
            let uri = Self.uri(daemon.folder, "x")
            let text = try Self.shell(["nbdinfo", uri])
            #expect(text.contains("qemu:dirty-bitmap:a") && text.contains("qemu:dirty-bitmap:b"))
            let script = """
                import nbd, sys
                h = nbd.NBD()
                h.set_opt_mode(True)
                h.add_meta_context('qemu:dirty-bitmap:')
                h.connect_uri(sys.argv[1])
                found = []
                h.opt_list_meta_context(found.append)
                print(','.join(found))
                h.opt_abort()
                """
            let found = try Self.shell(["/usr/bin/python3", "-c", script, uri])
            #expect(found == "qemu:dirty-bitmap:a,qemu:dirty-bitmap:b\n")
        }
    }

    @Test func aLiveBitmapGoesOnRecordingWhileItIsExported() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try export(daemon)
            let uri = Self.uri(daemon.folder, "x")
            try Self.shell(["qemu-io", "-f", "raw", "-c", "write 500k 4k", uri])
            let found3 = try Self.bitmaps(client)
            #expect(found3.contains("count=16384"))
            let map = try Self.shell(["nbdinfo", "--map=qemu:dirty-bitmap:a", uri])
            #expect(map.contains("512000"))
        }
    }

    @Test func theOlderCommandTakesABitmap() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try daemon.client()
            try client.execute(
                "block-dirty-bitmap-add", ["node": "r", "name": "a", "disabled": true])
            try client.execute("nbd-server-add", ["device": "r", "name": "old", "bitmap": "a"])
            let text = try Self.shell(["nbdinfo", Self.uri(daemon.folder, "old")])
            #expect(text.contains("qemu:dirty-bitmap:a"))
        }
    }

    @Test func aNodeWhoseBitmapIsExportedStays() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try daemon.client()
            try client.execute(
                "blockdev-add", ["driver": "null-co", "node-name": "n", "size": 1_048_576])
            try client.execute("block-dirty-bitmap-add", ["node": "n", "name": "a"])
            try client.execute(
                "block-export-add",
                [
                    "type": "nbd", "id": "x", "node-name": "r", "name": "x", "writable": true,
                    "bitmaps": [["node": "n", "name": "a"]],
                ])
            try client.execute("blockdev-del", ["node-name": "n"])
            let uri = Self.uri(daemon.folder, "x")
            let map = try Self.shell(["nbdinfo", "--map=qemu:dirty-bitmap:a", uri])
            #expect(map.contains("1048576"))
            try client.execute("block-export-del", ["id": "x"])
            let reason = try client.refusal("blockdev-del", ["node-name": "n"])
            #expect(reason.contains("'n'"))
        }
    }

    // MARK: Frozen views

    @Test func aFrozenViewOfDirtyClustersIsReadWithItsBitmap() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try export(daemon)
            try client.execute("block-export-del", ["id": "x"])
            _ = FileManager.default.createFile(
                atPath: "\(daemon.folder)/temp", contents: Data(count: 1 << 20))
            try client.execute(
                "blockdev-add",
                [
                    "driver": "raw", "node-name": "t",
                    "file": ["driver": "file", "filename": .string("\(daemon.folder)/temp")],
                ])
            try client.execute("block-dirty-bitmap-disable", ["node": "r", "name": "b"])
            try client.execute(
                "blockdev-add",
                [
                    "driver": "copy-before-write", "node-name": "c", "file": "r", "target": "t",
                    "bitmap": ["node": "r", "name": "b"],
                ])
            try client.execute(
                "blockdev-replace",
                ["parent-type": "export", "export-id": "e", "new-child": "c"])
            try client.execute(
                "blockdev-add", ["driver": "snapshot-access", "node-name": "s", "file": "c"])
            try client.execute(
                "block-export-add",
                [
                    "type": "nbd", "id": "s", "node-name": "s", "name": "s",
                    "bitmaps": [["node": "r", "name": "b"]],
                ])
            try Self.shell([
                "qemu-io", "-f", "raw", "-c", "write -P 7 8192 4096", Self.uri(daemon.folder),
            ])
            let uri = Self.uri(daemon.folder, "s")
            let map = try Self.shell(["nbdinfo", "--map=qemu:dirty-bitmap:b", uri])
            #expect(map.split(separator: "\n").count == 3)
            try Self.shell(["qemu-io", "-r", "-f", "raw", "-c", "read -P 205 8192 4096", uri])
        }
    }

    /// Two images with a bitmap each, the first of which cannot be written any more.
    @Test func removalsOfATransactionAreFinishedAlthoughOneFails() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            func file(_ name: String) -> JSONValue {
                ["driver": "file", "filename": .string("\(daemon.folder)/\(name)")]
            }
            for name in ["one", "two"] {
                try Self.shell([
                    "qemu-img", "create", "-qf", "qcow2", "\(daemon.folder)/\(name)", "1M",
                ])
                try Self.shell(["qemu-img", "bitmap", "--add", "\(daemon.folder)/\(name)", "b"])
            }
            let broken: JSONValue = [
                "driver": "blkdebug", "image": file("one"),
                "inject-error": [["event": "none", "iotype": "write", "errno": 5]],
            ]
            for (name, below) in [("one", broken), ("r", file("two"))] {
                try client.execute(
                    "blockdev-add",
                    ["driver": "qcow2", "node-name": .string(name), "file": below])
            }
            let actions: [JSONValue] = ["one", "r"].map { node in
                [
                    "type": "block-dirty-bitmap-remove",
                    "data": ["node": .string(node), "name": "b"],
                ]
            }
            let reason = try client.refusal("transaction", ["actions": .array(actions)])
            #expect(reason.contains("injected"), "\(reason)")
            try client.execute("blockdev-del", ["node-name": "r"])
            try client.execute(
                "blockdev-add", ["driver": "qcow2", "node-name": "r", "file": file("two")])
            #expect(try Self.bitmaps(client) == "none")
        }
    }
}
