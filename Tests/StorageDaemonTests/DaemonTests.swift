import BlockCore
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// The daemon as its clients see it, over a socket.
@Suite struct DaemonTests {
    static let exported = [
        "--blockdev", "driver=file,node-name=f,filename=$/disk", "--blockdev",
        "raw,node-name=r,file=f", "--nbd-server", "addr.type=unix,addr.path=$/nbd", "--export",
        "nbd,id=e,node-name=r,writable=on",
    ]

    // MARK: Life

    @Test func theCommandLineSetsUpTheGraph() async throws {
        try await MonitoredDaemon.with(Self.exported + ["--pidfile", "$/pid"]) { daemon in
            let client = try daemon.client()
            #expect(
                try client.execute("query-block-exports") == [
                    ["id": "e", "type": "nbd", "node-name": "r", "shutting-down": false]
                ])
            let process = try String(contentsOfFile: "\(daemon.folder)/pid", encoding: .utf8)
            #expect(process == "\(getpid())\n")
            try client.execute("quit")
            _ = daemon.waitForEnd()
            #expect(client.line() != nil, "the end of the export is told")
            #expect(client.line() == nil)
            #expect(!FileManager.default.fileExists(atPath: "\(daemon.folder)/pid"))
            #expect(!FileManager.default.fileExists(atPath: daemon.socketPath))
        }
    }

    @Test(arguments: [
        (["--blockdev", "raw,node-name=r,file=f"], "--blockdev: "),
        (["--export", "nbd,id=e,node-name=r"], "--export: "),
        (["--monitor", "none"], "--monitor: "),
        (["--blockdev", "file,filename=$/disk"], "node-name"),
        (["--object", "secret,id=s"], "'data' or 'file'"),
        (["--chardev", "socket,id=x,server=on"], "path"),
        (["--chardev", "nosuch,id=x"], "nosuch"),
    ])
    func aStepThatFailsEndsTheDaemonWithAnError(arguments: [String], part: String) async throws {
        do {
            try await MonitoredDaemon.with(arguments) { _ in }
            Issue.record("the daemon started")
        } catch let error as BlockError {
            #expect(error.description.contains(part), "\(error)")
        }
    }

    @Test(arguments: [
        ("zzz", "there is no option 'zzz'"),
        ("read-only", "option 'read-only' expects a boolean (on or off), not integer"),
        ("size", "option 'size' expects a size, not array"),
    ])
    func anErrorOfANodesOptionNamesTheNodeOnce(option: String, reason: String) async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            var options: JSONObject = ["driver": "null-co", "node-name": "a"]
            let expected = "node 'a': driver 'null-co': \(reason)"
            let value: JSONValue = option == "size" ? [] : 1
            options[option] = value
            #expect(try client.refusal("blockdev-add", .object(options)) == expected)
            options[option] = nil
            try client.execute("blockdev-add", .object(options))
            options[option] = value
            let refusal = try client.refusal("blockdev-reopen", ["options": [.object(options)]])
            #expect(refusal.hasPrefix("node 'a': "))
            #expect(refusal.components(separatedBy: "node 'a'").count == 2, "\(refusal)")
        }
    }

    // MARK: Clients

    @Test func severalClientsHearTheSameEvents() async throws {
        try await MonitoredDaemon.with(Self.exported) { daemon in
            let first = try daemon.client()
            let second = try daemon.client()
            let silent = try RawQMPClient(daemon.socketPath)
            try first.execute("block-export-del", ["id": "e"])
            for client in [first, second] {
                let event = try client.event()
                #expect(event["event"] == "BLOCK_EXPORT_DELETED")
                #expect(event["data"] == ["id": "e"])
            }
            // Who has not negotiated hears the greeting alone.
            #expect(try silent.message()["QMP"] != nil)
            silent.send("{\"execute\": \"qmp_capabilities\"}")
            #expect(try silent.message() == ["return": [:]])
        }
    }

    @Test func pipelinedCommandsAreAnsweredInTheirOrder() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            let count = 3000
            for index in 0..<count {
                client.send("{\"execute\": \"query-version\", \"id\": \(index)}")
            }
            for index in 0..<count {
                #expect(try client.message()["id"] == .integer(index))
            }
        }
    }

    @Test func garbageDisturbsNobody() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            let other = try daemon.client()
            client.send("GET / HTTP/1.1\r\n\r\n\u{1}\u{2}}}}]]]\n")
            #expect(try client.message()["error"]?["class"] == "GenericError")
            client.send("{\"execute\": \"query-version\", \"id\": \"after\"}")
            while try client.message()["id"] != "after" {}
            #expect(try other.execute("query-block") == [])
            // Gone in the middle of a document.
            client.send("{\"execute\": \"qu")
            client.endInput()
            while client.line() != nil {}
            #expect(try other.execute("query-jobs") == [])
        }
    }

    @Test func aClientThatEndsItsInputStillGetsItsReplies() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            client.send("{\"execute\": \"query-version\"}{\"execute\": \"query-block\"}")
            client.endInput()
            #expect(try client.message()["return"]?["qemu"]?["major"] == 10)
            #expect(try client.message()["return"] == [])
            #expect(client.line() == nil)
        }
    }

    @Test(
        .enabled(
            if: PythonPackages.canRun || ProcessInfo.processInfo.environment["CI"] != nil,
            "Python's package qemu.qmp is not there: scripts/setup fetches it"))
    func qemusOwnClientDrivesTheDaemon() async throws {
        try await MonitoredDaemon.with(Self.exported) { daemon in
            let script = """
                import asyncio, sys
                from qemu.qmp import QMPClient, ExecuteError
                async def main():
                    client = QMPClient('test')
                    await client.connect(sys.argv[1])
                    schema = await client.execute('query-qmp-schema')
                    commands = await client.execute('query-commands')
                    named = {entity['name'] for entity in schema}
                    assert all(command['name'] in named for command in commands)
                    try:
                        await client.execute('no-such-command')
                        assert False
                    except ExecuteError as error:
                        assert error.error_class == 'CommandNotFound', error
                    await client.execute('block-export-del', {'id': 'e'})
                    event = await asyncio.wait_for(client.events.get(), 30)
                    assert event['event'] == 'BLOCK_EXPORT_DELETED', event
                    await client.disconnect()
                asyncio.run(main())
                """
            let status = try PythonPackages.run(script, daemon.socketPath)
            #expect(status == 0)
        }
    }

    // MARK: Nodes

    @Test func reopeningReplacesChildrenAllOrNone() async throws {
        try await MonitoredDaemon.with(Self.exported) { daemon in
            let client = try daemon.client()
            try client.execute(
                "blockdev-add", ["driver": "null-co", "node-name": "n", "size": 1_048_576])
            func child() throws -> JSONValue? {
                guard
                    case .array(let nodes) = try client.execute("query-named-block-nodes"),
                    let node = nodes.first(where: { $0["node-name"] == "r" }),
                    case .array(let children)? = node["children"]
                else { return nil }
                return children.first?["node-name"]
            }
            let moved: JSONValue = ["driver": "raw", "node-name": "r", "file": "n"]
            let wrong: JSONValue = ["driver": "null-co", "node-name": "n", "size": 512]
            let reason = try client.refusal("blockdev-reopen", ["options": [moved, wrong]])
            #expect(reason.contains("'size'"))
            #expect(try child() == "f")
            try client.execute("blockdev-reopen", ["options": [moved]])
            #expect(try child() == "n")
            try client.execute("blockdev-del", ["node-name": "f"])
        }
    }

    // MARK: Objects

    @Test func objectsAreMadeAndRemoved() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            try client.execute(
                "object-add",
                ["qom-type": "secret", "id": "s", "data": "Zm9v", "format": "base64"])
            let again = try client.refusal(
                "object-add", ["qom-type": "secret", "id": "s", "data": "x"])
            #expect(again.contains("already"))
            try client.execute("object-del", ["id": "s"])
            #expect(try client.refusal("object-del", ["id": "s"]).contains("'s'"))
            let unknown = try client.refusal("object-add", ["qom-type": "secrt", "id": "s"])
            #expect(unknown.contains("secret"))
        }
    }

    @Test func theServerRefusesCredentialsThatAreNotThere() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            let reason = try client.refusal(
                "nbd-server-start",
                [
                    "addr": ["type": "unix", "data": ["path": .string("\(daemon.folder)/n")]],
                    "tls-creds": "none",
                ])
            #expect(reason.contains("'none'"))
            let missing = try client.refusal(
                "object-add",
                [
                    "qom-type": "tls-creds-x509", "id": "t", "endpoint": "server",
                    "dir": .string(daemon.folder),
                ])
            #expect(missing.contains("ca-cert.pem"))
        }
    }

    @Test func aJobOfCreationMakesAnImage() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            let path = "\(daemon.folder)/made"
            try client.execute(
                "blockdev-create",
                [
                    "job-id": "j",
                    "options": ["driver": "file", "filename": .string(path), "size": 65536],
                ])
            var status: JSONValue?
            while status != "concluded" { status = try client.event()["data"]?["status"] }
            try client.execute("job-dismiss", ["id": "j"])
            let size = try FileManager.default.attributesOfItem(atPath: path)[.size] as? Int
            #expect(size == 65536)
        }
    }
}
