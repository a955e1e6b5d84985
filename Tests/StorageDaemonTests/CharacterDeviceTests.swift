import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Character devices, and open files that clients pass along.
@Suite struct CharacterDeviceTests {
    @Test func aRingBufferKeepsWhatWasWrittenLast() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            func read(_ size: Int, _ format: String = "utf8") throws -> JSONValue {
                try client.execute(
                    "ringbuf-read",
                    ["device": "r", "size": .integer(size), "format": .string(format)])
            }
            try client.execute(
                "chardev-add",
                ["id": "r", "backend": ["type": "ringbuf", "data": ["size": 8]]])
            try client.execute("ringbuf-write", ["device": "r", "data": "hello world"])
            #expect(try read(4) == "lo w")
            #expect(try read(100) == "orld")
            #expect(try read(100) == "")
            try client.execute(
                "ringbuf-write", ["device": "r", "data": "aGVsbG8=", "format": "base64"])
            #expect(try read(100, "base64") == "aGVsbG8=")
            let odd = try client.refusal(
                "chardev-add", ["id": "o", "backend": ["type": "ringbuf", "data": ["size": 9]]])
            #expect(odd.contains("power of two"))
            #expect(
                try client.refusal("ringbuf-read", ["device": "q", "size": 1]).contains("'q'"))
            try client.execute("chardev-remove", ["id": "r"])
            #expect(try client.refusal("chardev-send-break", ["id": "r"]).contains("'r'"))
        }
    }

    @Test func aDeviceThatAMonitorUsesStays() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            #expect(try client.refusal("chardev-remove", ["id": "q"]).contains("busy"))
            let path = "\(daemon.folder)/other"
            try client.execute(
                "chardev-add",
                [
                    "id": "s",
                    "backend": [
                        "type": "socket",
                        "data": ["addr": ["type": "unix", "data": ["path": .string(path)]]],
                    ],
                ])
            #expect(FileManager.default.fileExists(atPath: path))
            let devices = try client.execute("query-chardev")
            #expect(QueryTests.element(devices, "label", "q")?["frontend-open"] == true)
            #expect(
                QueryTests.element(devices, "label", "s")?["filename"]
                    == .string("disconnected:unix:\(path),server=on"))
            try client.execute(
                "chardev-change", ["id": "s", "backend": ["type": "null", "data": [:]]])
            #expect(!FileManager.default.fileExists(atPath: path))
            try client.execute("chardev-remove", ["id": "s"])
            let unknown = try client.refusal(
                "chardev-add", ["id": "p", "backend": ["type": "nosuch", "data": [:]]])
            #expect(unknown.contains("socket"))
        }
    }

    /// Passes descriptors as libvirt does, and has the daemon use them.
    @Test func openFilesThatAClientPassesAreUsed() async throws {
        try await MonitoredDaemon.with { daemon in
            let script = """
                import json, os, socket, sys
                folder = sys.argv[1]
                qmp = socket.socket(socket.AF_UNIX)
                qmp.connect(folder + "/qmp")
                lines = qmp.makefile("r")
                lines.readline()
                def ask(command, fds=[], **arguments):
                    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
                    text = json.dumps({"execute": command, "arguments": arguments}).encode()
                    socket.send_fds(qmp, [text], fds)
                    return json.loads(lines.readline())
                def good(*arguments, **named):
                    reply = ask(*arguments, **named)
                    assert "return" in reply, reply
                    return reply["return"]
                def bad(part, *arguments, **named):
                    reply = ask(*arguments, **named)
                    assert part in reply["error"]["desc"], reply
                good("qmp_capabilities")
                bad("SCM_RIGHTS", "getfd", fdname="a")
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(folder + "/passed")
                listener.listen()
                good("getfd", [listener.fileno()], fdname="door")
                bad("name", "getfd", [listener.fileno()], fdname="1door")
                address = {"type": "fd", "data": {"str": "door"}}
                good("nbd-server-start", addr=address)
                bad("door", "closefd", fdname="door")
                disk = os.open(folder + "/disk", os.O_RDWR)
                added = good("add-fd", [disk], opaque="the disk")
                sets = good("query-fdsets")
                assert sets[0]["fds"][0]["opaque"] == "the disk", sets
                os.rename(folder + "/disk", folder + "/moved")
                name = "/dev/fdset/%d" % added["fdset-id"]
                good("blockdev-add", driver="file", node_name="f", filename=name)
                bad("read-only", "blockdev-add", driver="file", node_name="g", filename=name,
                    read_only=True)
                bad("/dev/fdset/99", "blockdev-add", driver="file", node_name="g",
                    filename="/dev/fdset/99")
                good("remove-fd", fdset_id=added["fdset-id"])
                assert good("query-fdsets") == []
                good("block-export-add", type="nbd", id="e", node_name="f", writable=True)
                """
            #expect(try PythonPackages.run(script, daemon.folder) == 0)
            let result = try ChildProgram.run([
                "qemu-io", "-f", "raw", "-c", "write -P 5 0 4k",
                "nbd+unix:///f?socket=\(daemon.folder)/passed",
            ])
            #expect(result.status == 0, "\(result.errors)")
            try daemon.client().execute("nbd-server-stop")
            let disk = try #require(FileManager.default.contents(atPath: "\(daemon.folder)/moved"))
            #expect(disk.prefix(4096).allSatisfy { $0 == 5 })
        }
    }

    @Test func addressesThatHaveToBeNumericAreNotLookedUp() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            func start(_ host: String, _ more: JSONObject) -> JSONValue {
                var data: JSONObject = ["host": .string(host), "port": "0"]
                for (key, value) in more.members { data[key] = value }
                return ["addr": ["type": "inet", "data": .object(data)]]
            }
            let refused = try client.refusal(
                "nbd-server-start", start("localhost", ["numeric": true]))
            #expect(refused.contains("localhost"))
            let bounds = try client.refusal(
                "nbd-server-start", start("127.0.0.1", ["keep-alive-idle": 99999]))
            #expect(bounds.contains("keep-alive-idle"))
            try client.execute(
                "nbd-server-start",
                start("127.0.0.1", ["numeric": true, "keep-alive": false]))
        }
    }
}
