import BlockCore
import BlockIO
import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Nodes on several I/O threads, with libnbd's clients at work on them.
@Suite struct ThreadTests {
    /// Two disks of 1 MiB, each exported; threads a and b.
    private static let disks = [
        "--object", "iothread,id=a", "--object", "iothread,id=b", "--blockdev",
        "driver=file,node-name=f,filename=$/disk", "--blockdev", "raw,node-name=r,file=f",
        "--blockdev", "driver=null-co,node-name=n,size=1048576,read-zeroes=on", "--nbd-server",
        "addr.type=unix,addr.path=$/nbd",
    ]

    private static func export(_ name: String, _ more: JSONObject = [:]) -> JSONValue {
        var options: JSONObject = [
            "type": "nbd", "id": .string(name), "node-name": .string(name), "writable": true,
        ]
        for (key, value) in more.members { options[key] = value }
        return .object(options)
    }

    private static func move(
        _ client: RawQMPClient, _ node: String, to thread: JSONValue
    ) throws {
        try client.execute(
            "x-blockdev-set-iothread",
            ["node-name": .string(node), "iothread": thread, "force": true])
    }

    /// The nodes on a thread, as the refusal to delete it tells.
    private static func refusal(_ client: RawQMPClient, _ thread: String) throws -> String {
        try client.refusal("object-del", ["id": .string(thread)])
    }

    // MARK: Objects

    @Test func aThreadRunsFromItsObjectsBeginningToItsEnd() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            #expect(try client.execute("query-iothreads") == [])
            try client.execute(
                "object-add", ["qom-type": "iothread", "id": "a", "poll-max-ns": 1000])
            try client.execute("object-add", ["qom-type": "iothread", "id": "b"])
            let list = try client.execute("query-iothreads")
            let first = try #require(QueryTests.element(list, "id", "a"))
            let second = try #require(QueryTests.element(list, "id", "b"))
            #expect(first["poll-max-ns"] == 1000 && second["poll-max-ns"] == 32768)
            #expect(first["poll-grow"] == 0 && first["poll-shrink"] == 0)
            #expect(first["aio-max-batch"] == 0)
            #expect(first["thread-id"] != second["thread-id"])
            guard case .integer(let identifier)? = first["thread-id"] else {
                Issue.record("no thread-id")
                return
            }
            let path = "/proc/self/task/\(identifier)"
            let name = try String(contentsOfFile: "\(path)/comm", encoding: .utf8)
            #expect(name == "IO a\n")
            try client.execute("qom-set", ["path": "a", "property": "poll-max-ns", "value": 0])
            let changed = try client.execute("query-iothreads")
            #expect(QueryTests.element(changed, "id", "a")?["poll-max-ns"] == 0)
            try client.execute("object-del", ["id": "a"])
            #expect(
                try client.refusal(
                    "object-add", ["qom-type": "iothread", "id": "c", "poll-grow": -1]
                ).contains("'poll-grow'"))
            while FileManager.default.fileExists(atPath: path) { usleep(1000) }
        }
    }

    @Test func theWorkersOfAThreadAreAsManyAsItsPropertiesSay() async throws {
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            func refusal(_ command: String, _ arguments: JSONValue) async -> String {
                do throws(BlockError) {
                    _ = try await daemon.execute(command, arguments)
                    return ""
                } catch { return error.description }
            }
            let crossed = await refusal(
                "object-add",
                [
                    "qom-type": "iothread", "id": "a", "thread-pool-min": 3,
                    "thread-pool-max": 2,
                ])
            #expect(crossed.contains("'thread-pool-min' must not be above"), "\(crossed)")
            _ = try await daemon.execute(
                "object-add",
                [
                    "qom-type": "iothread", "id": "a", "thread-pool-min": 3,
                    "thread-pool-max": 100, "poll-grow": 4, "poll-shrink": 2, "aio-max-batch": 8,
                ])
            let made = try daemon.requireThread("a")
            #expect(made.settings.workers.threadCount == 3)
            let tuning = try await made.thread.visit { () throws(BlockError) in
                #expect(made.thread.workers === made.settings.workers)
                return made.thread.tuning
            }
            #expect(tuning.pollGrowth == 4 && tuning.pollShrinkage == 2)
            #expect(tuning.batchCountMax == 8 && tuning.pollNanosecondsMax == 32768)
            func set(_ name: String, _ number: Int) -> JSONValue {
                ["path": "/objects/a", "property": .string(name), "value": .integer(number)]
            }
            let below = await refusal("qom-set", set("thread-pool-max", 2))
            #expect(below.contains("'thread-pool-min' must not be above"), "\(below)")
            _ = try await daemon.execute("qom-set", set("thread-pool-min", 5))
            #expect(made.settings.workers.threadCount == 5)
            _ = try await daemon.execute("qom-set", set("thread-pool-min", 0))
            _ = try await daemon.execute("object-del", ["id": "a"])
        }
    }

    @Test func theMainThreadRunsByItsObject() async throws {
        try await TestDaemon.run { test throws(BlockError) in
            let daemon = test.daemon
            func refusal(_ command: String, _ arguments: JSONValue) async -> String {
                do throws(BlockError) {
                    _ = try await daemon.execute(command, arguments)
                    return ""
                } catch { return error.description }
            }
            let polling: JSONValue = ["qom-type": "main-loop", "id": "m", "poll-max-ns": 1]
            #expect(await refusal("object-add", polling).contains("'poll-max-ns' is unexpected"))
            let negative: JSONValue = ["qom-type": "main-loop", "id": "m", "aio-max-batch": -1]
            #expect(await refusal("object-add", negative).contains("'aio-max-batch'"))
            _ = try await daemon.execute(
                "object-add",
                [
                    "qom-type": "main-loop", "id": "m", "thread-pool-min": 2, "aio-max-batch": 8,
                ])
            #expect(daemon.thread.workers.threadCount == 2)
            #expect(daemon.thread.tuning.batchCountMax == 8)
            func set(_ name: String, _ number: Int) -> JSONValue {
                ["path": "/objects/m", "property": .string(name), "value": .integer(number)]
            }
            _ = try await daemon.execute("qom-set", set("aio-max-batch", 9))
            #expect(daemon.thread.tuning.batchCountMax == 9)
            #expect(await refusal("qom-set", set("thread-pool-max", 1)).contains("thread-pool-min"))
            #expect(await refusal("qom-set", set("poll-grow", 1)).contains("no property"))
            #expect(
                await refusal("object-add", ["qom-type": "main-loop", "id": "n"])
                    .contains("already"))
            #expect(await refusal("object-del", ["id": "m"]).contains("in use"))
            try await test.guestWrite(0, 4096, 0x22)
        }
    }

    @Test func aThreadStaysWhileNodesAreOnIt() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            try Self.move(client, "f", to: "a")
            let reason = try Self.refusal(client, "a")
            #expect(reason.contains("nodes: f, r") || reason.contains("nodes: r, f"), "\(reason)")
            try Self.move(client, "r", to: .null)
            try client.execute("object-del", ["id": "a"])
            // Whoever was there goes on.
            try client.execute("block-export-add", Self.export("r"))
            try QueryTests.use(daemon, "write -P 3 0 64k", "read -P 3 0 64k")
        }
    }

    // MARK: Moves

    @Test func aNodeThatIsUsedMovesOnlyByForce() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            try client.execute("block-export-add", Self.export("r", ["iothread": "a"]))
            let arguments: JSONValue = ["node-name": "r", "iothread": "b"]
            #expect(
                try client.refusal("x-blockdev-set-iothread", arguments).contains("NBD export 'r'"))
            try Self.move(client, "r", to: "b")
            let reason = try Self.refusal(client, "b")
            #expect(reason.contains("nodes: f, r") || reason.contains("nodes: r, f"), "\(reason)")
            try client.execute("object-del", ["id": "a"])
            #expect(
                try client.refusal(
                    "x-blockdev-set-iothread", ["node-name": "r", "iothread": "a", "force": true]
                ).contains("'a'"))
        }
    }

    @Test func aFixedExportKeepsItsNodeWhereItIs() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            let fixed: JSONObject = ["iothread": "a", "fixed-iothread": true]
            try client.execute("block-export-add", Self.export("r", fixed))
            let reason = try client.refusal(
                "x-blockdev-set-iothread", ["node-name": "f", "iothread": "b", "force": true])
            #expect(reason.contains("NBD export 'r'") && reason.contains("fixed-iothread"))
            // A second export would have it elsewhere: that is an error only where it insists.
            var other = Self.export("r", ["id": "s", "name": "s", "iothread": "b"])
            try client.execute("block-export-add", other)
            other = Self.export(
                "r", ["id": "t", "name": "t", "iothread": "b", "fixed-iothread": true])
            #expect(try client.refusal("block-export-add", other).contains("fixed-iothread"))
            #expect(
                try client.refusal(
                    "block-export-add", Self.export("n", ["iothread": "none"])
                ).contains("'none'"))
            try client.execute("block-export-del", ["id": "s"])
            try client.execute("block-export-del", ["id": "r"])
            try Self.move(client, "r", to: "b")
        }
    }

    @Test(arguments: [false, true]) func aClientAtWorkDoesNotNoticeMoves(
        usesTLS: Bool
    ) async throws {
        let key = "qemu:f00df00df00df00df00df00df00df00d\n"
        try await MonitoredDaemon.with([
            "--object", "iothread,id=a", "--object", "iothread,id=b", "--blockdev",
            "driver=file,node-name=f,filename=$/disk", "--blockdev", "raw,node-name=r,file=f",
        ]) { daemon in
            let client = try daemon.client()
            try key.write(
                toFile: "\(daemon.folder)/keys.psk", atomically: false, encoding: .utf8)
            var server: JSONObject = [
                "addr": ["type": "unix", "data": ["path": .string("\(daemon.folder)/nbd")]]
            ]
            if usesTLS {
                try client.execute(
                    "object-add",
                    [
                        "qom-type": "tls-creds-psk", "id": "t", "endpoint": "server",
                        "dir": .string(daemon.folder),
                    ])
                server["tls-creds"] = "t"
            }
            try client.execute("nbd-server-start", .object(server))
            try client.execute("block-export-add", Self.export("r", ["iothread": "a"]))
            let worker = try Worker(Worker.verifying, [daemon.folder, usesTLS ? "tls" : "plain"])
            for round in 0..<30 where worker.isRunning {
                let places: [JSONValue] = ["b", .null, "a"]
                try Self.move(client, round % 2 == 0 ? "r" : "f", to: places[round % 3])
                usleep(UInt32((round % 4) * 5_000))
            }
            worker.askToEnd()
            #expect(worker.output() == "good\n")
            // A client that waits, and one that comes, after all of it.
            try client.execute("block-export-del", ["id": "r", "mode": "hard"])
        }
    }

    @Test func disksOnTwoThreadsAreServedAtOnce() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            try client.execute("block-export-add", Self.export("r", ["iothread": "a"]))
            try client.execute("block-export-add", Self.export("n", ["iothread": "b"]))
            let before = try Self.processorTime(client)
            let workers = try ["r", "n"].map { try Worker(Worker.busy, [daemon.folder, $0]) }
            for worker in workers { #expect(worker.output() == "good\n") }
            let after = try Self.processorTime(client)
            for name in ["a", "b"] {
                #expect(
                    (after[name] ?? 0) > (before[name] ?? 0), "thread \(name) had nothing to do")
            }
            let stats = try client.execute("query-blockstats")
            for name in ["r", "n"] {
                let own = QueryTests.element(stats, "device", .string(name))?["stats"]
                #expect(own?["rd_operations"] == 20000, "\(name)")
            }
        }
    }

    /// Nanoseconds that each thread was on a processor.
    private static func processorTime(_ client: RawQMPClient) throws -> [String: Int] {
        guard case .array(let list) = try client.execute("query-iothreads") else { return [:] }
        var result: [String: Int] = [:]
        for thread in list {
            guard case .string(let name)? = thread["id"],
                case .integer(let identifier)? = thread["thread-id"]
            else { continue }
            let text = try String(
                contentsOfFile: "/proc/self/task/\(identifier)/schedstat", encoding: .utf8)
            result[name] = text.split(separator: " ").first.flatMap { Int($0) }
        }
        return result
    }

    // MARK: Joined nodes

    @Test func nodesThatAreJoinedAreOnOneThread() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            try client.execute("block-export-add", Self.export("r", ["iothread": "a"]))
            // The target comes from the main thread.
            try client.execute(
                "blockdev-add",
                ["driver": "copy-before-write", "node-name": "c", "file": "r", "target": "n"])
            let reason = try Self.refusal(client, "a")
            for name in ["f", "r", "n", "c"] { #expect(reason.contains(name), "\(reason)") }
            // As a whole.
            try Self.move(client, "n", to: "b")
            try client.execute("object-del", ["id": "a"])
            // A fixed one does not come.
            try client.execute("blockdev-add", ["driver": "null-co", "node-name": "x"])
            try client.execute("block-export-add", Self.export("x", ["fixed-iothread": true]))
            let refused = try client.refusal(
                "blockdev-replace",
                [
                    "parent-type": "driver", "node-name": "c", "child": "file", "new-child": "x",
                ])
            #expect(refused.contains("'x'") && refused.contains("fixed-iothread"), "\(refused)")
        }
    }

    @Test func aThrottleGroupKeepsItsNodesTogether() async throws {
        let group = ["--object", "throttle-group,id=g,x-iops-total=1000000"]
        try await MonitoredDaemon.with(Self.disks + group) { daemon in
            let client = try daemon.client()
            func add(_ name: String, over child: String) throws {
                try client.execute(
                    "blockdev-add",
                    [
                        "driver": "throttle", "node-name": .string(name), "throttle-group": "g",
                        "file": .string(child),
                    ])
            }
            try add("t", over: "r")
            try Self.move(client, "t", to: "a")
            try Self.move(client, "n", to: "b")
            #expect(throws: RawQMPClient.Refused.self) { try add("u", over: "n") }
            try Self.move(client, "n", to: "a")
            try add("u", over: "n")
            let reason = try client.refusal(
                "x-blockdev-set-iothread", ["node-name": "n", "iothread": .null])
            #expect(reason.contains("'g'") && reason.contains("'t'"), "\(reason)")
            try client.execute(
                "qom-set", ["path": "g", "property": "limits", "value": ["iops-total": 2_000_000]])
            #expect(try client.refusal("object-del", ["id": "g"]).contains("'u'"))
        }
    }

    @Test func bitmapsAreMergedAcrossThreads() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            try client.execute("block-export-add", Self.export("r", ["iothread": "a"]))
            for node: JSONValue in ["r", "n"] {
                try client.execute("block-dirty-bitmap-add", ["node": node, "name": "m"])
            }
            try QueryTests.use(daemon, "write 64k 64k")
            try client.execute(
                "block-dirty-bitmap-merge",
                ["node": "n", "target": "m", "bitmaps": [["node": "r", "name": "m"]]])
            let nodes = try client.execute("query-named-block-nodes")
            for name: JSONValue in ["r", "n"] {
                guard
                    case .array(let bitmaps)? = QueryTests.element(
                        nodes, "node-name", name)?["dirty-bitmaps"]
                else {
                    Issue.record("no bitmaps")
                    return
                }
                #expect(bitmaps.first?["count"] == 65536)
            }
        }
    }

    @Test func eventsOfAllThreadsAreTold() async throws {
        try await MonitoredDaemon.with(Self.disks) { daemon in
            let client = try daemon.client()
            try client.execute("block-export-add", Self.export("r", ["iothread": "a"]))
            try client.execute(
                "block-set-write-threshold", ["node-name": "f", "write-threshold": 4096])
            try QueryTests.use(daemon, "write 4k 8k")
            #expect(try client.event()["event"] == "BLOCK_WRITE_THRESHOLD")
        }
    }

    // MARK: Transactions

    /// A writer counts: on the first disk, then, when that is done, on the second. Whenever both are
    /// frozen at one instant, the first is as far as the second or one ahead.
    @Test func disksOnTwoThreadsAreFrozenAtOneInstant() async throws {
        try await MonitoredDaemon.with([
            "--object", "iothread,id=a", "--object", "iothread,id=b", "--nbd-server",
            "addr.type=unix,addr.path=$/nbd",
        ]) { daemon in
            let client = try daemon.client()
            for name in ["x", "y"] {
                let path = "\(daemon.folder)/\(name)"
                _ = FileManager.default.createFile(atPath: path, contents: Data(count: 1 << 20))
                try client.execute(
                    "blockdev-add",
                    ["driver": "file", "node-name": .string(name), "filename": .string(path)])
                try client.execute(
                    "block-export-add",
                    Self.export(name, ["iothread": name == "x" ? "a" : "b"]))
            }
            let worker = try Worker(Worker.counting, [daemon.folder])
            for round in 0..<20 where worker.isRunning {
                usleep(3_000)
                try Self.freeze(client, daemon, round)
            }
            worker.askToEnd()
            #expect(worker.output() == "good\n")
        }
    }

    private static func freeze(
        _ client: RawQMPClient, _ daemon: MonitoredDaemon, _ round: Int
    ) throws {
        func filter(_ name: String) -> JSONValue {
            [
                "type": "blockdev-add",
                "data": [
                    "driver": "copy-before-write", "node-name": .string("c\(name)"),
                    "file": .string(name), "target": .string("t\(name)"),
                ],
            ]
        }
        func put(_ node: String, below export: String) -> JSONValue {
            [
                "type": "blockdev-replace",
                "data": [
                    "parent-type": "export", "export-id": .string(export),
                    "new-child": .string(node),
                ],
            ]
        }
        for name in ["x", "y"] {
            let path = "\(daemon.folder)/t\(name)"
            _ = FileManager.default.createFile(atPath: path, contents: Data(count: 1 << 20))
            try client.execute(
                "blockdev-add",
                ["driver": "file", "node-name": .string("t\(name)"), "filename": .string(path)])
        }
        let begin: [JSONValue] = [
            filter("x"), filter("y"), put("cx", below: "x"), put("cy", below: "y"),
        ]
        if round % 3 == 0 {
            // One that fails changes nothing.
            let reason = try client.refusal(
                "transaction", ["actions": .array(begin + [["type": "abort", "data": [:]]])])
            #expect(reason.contains("abort"))
        }
        try client.execute("transaction", ["actions": .array(begin)])
        var counts: [String: UInt64] = [:]
        for name in ["x", "y"] {
            try client.execute(
                "blockdev-add",
                [
                    "driver": "snapshot-access", "node-name": .string("s\(name)"),
                    "file": .string("c\(name)"),
                ])
            try client.execute(
                "block-export-add",
                [
                    "type": "nbd", "id": .string("s\(name)"),
                    "node-name": .string("s\(name)"),
                ])
            let reader = try Worker(Worker.reading, [daemon.folder, "s\(name)"])
            counts[name] = UInt64(reader.output().trimmingCharacters(in: .whitespacesAndNewlines))
        }
        let first = try #require(counts["x"])
        let second = try #require(counts["y"])
        #expect(
            first == second || first == second + 1, "round \(round): \(first) and \(second)")
        for name in ["x", "y"] {
            try client.execute("block-export-del", ["id": .string("s\(name)"), "mode": "hard"])
            try client.execute("blockdev-del", ["node-name": .string("s\(name)")])
        }
        try client.execute(
            "transaction", ["actions": [put("x", below: "x"), put("y", below: "y")]])
        for name in ["x", "y"] {
            try client.execute("blockdev-del", ["node-name": .string("c\(name)")])
            try client.execute("blockdev-del", ["node-name": .string("t\(name)")])
        }
    }
}

/// A Python script over libnbd, beside the daemon. The script reads a line from its input when it is to end.
final class Worker {
    /// libnbd's Python module is the system's.
    private static let interpreter = "/usr/bin/python3"
    private let program: ChildProgram

    init(_ script: String, _ arguments: [String]) throws {
        program = try ChildProgram(
            [Self.interpreter, "-c", Self.beginning + script] + arguments, input: .held,
            errors: .joined)
    }

    var isRunning: Bool { program.isRunning }

    func askToEnd() { program.send("\n") }

    /// What it printed, once it has ended.
    func output() -> String { program.wait().output }

    private static let beginning = """
        import nbd, random, select, struct, sys
        folder = sys.argv[1]
        def connect(name, tls=False):
            handle = nbd.NBD()
            handle.set_export_name(name)
            if tls:
                handle.set_tls(nbd.TLS_REQUIRE)
                handle.set_tls_username("qemu")
                handle.set_tls_psk_file(folder + "/keys.psk")
            handle.connect_unix(folder + "/nbd")
            return handle
        def ending():
            return bool(select.select([sys.stdin], [], [], 0)[0])

        """

    /// Writes and reads back with many requests in flight, of a few bytes to more than a socket takes at once,
    /// and at the end all of the disk.
    static let verifying = """
        import os
        random.seed(4711)
        handle = connect("r", sys.argv[2] == "tls")
        model = bytearray(1 << 20)
        rounds = 0
        while rounds < 20 or not ending():
            rounds += 1
            flying = []
            # Each round's requests are apart from each other: 16 places.
            for place in range(16):
                start = place << 16
                count = random.choice([512, 4096, 12288, 65536])
                offset = start + 512 * random.randrange((65536 - count) // 512 + 1)
                if random.random() < 0.5:
                    data = os.urandom(count)
                    buffer = nbd.Buffer.from_bytearray(bytearray(data))
                    flying.append((handle.aio_pwrite(buffer, offset), None, offset, count))
                    model[offset:offset + count] = data
                else:
                    buffer = nbd.Buffer(count)
                    flying.append((handle.aio_pread(buffer, offset), buffer, offset, count))
            for cookie, buffer, offset, count in flying:
                while not handle.aio_command_completed(cookie):
                    handle.poll(-1)
                if buffer is not None and buffer.to_bytearray() != model[offset:offset + count]:
                    print("wrong data at", offset, "of", count, "in round", rounds)
                    sys.exit(1)
        handle.flush()
        if handle.pread(1 << 20, 0) != model:
            print("wrong data at the end")
            sys.exit(1)
        handle.shutdown()
        if open(folder + "/disk", "rb").read() != model:
            print("wrong data in the file")
            sys.exit(1)
        print("good")
        """

    static let busy = """
        handle = connect(sys.argv[2])
        for turn in range(1250):
            flying = [handle.aio_pread(nbd.Buffer(4096), 4096 * place) for place in range(16)]
            for cookie in flying:
                while not handle.aio_command_completed(cookie):
                    handle.poll(-1)
        print("good")
        """

    static let counting = """
        first, second = connect("x"), connect("y")
        count = 0
        while count < 100 or not ending():
            count += 1
            data = struct.pack(">Q", count).ljust(512)
            first.pwrite(data, 0)
            second.pwrite(data, 0)
        print("good")
        """

    static let reading = """
        print(struct.unpack(">Q", connect(sys.argv[2]).pread(512, 0)[:8])[0])
        """
}
