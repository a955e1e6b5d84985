import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import StorageDaemon

#if canImport(Glibc)
import Glibc
#endif

/// A daemon in this process with one exported disk of 1 MiB.
final class TestDaemon: @unchecked Sendable {
    let daemon: StorageDaemon
    let folder: String
    static let size = 1 << 20

    static func run<T: Sendable>(
        _ body: @escaping @Sendable (TestDaemon) async throws(BlockError) -> T
    ) async throws -> T {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> T in
            let test = try await TestDaemon(thread, folder)
            do throws(BlockError) {
                let result = try await body(test)
                try await test.daemon.close()
                return result
            } catch {
                try? await test.daemon.close()
                throw error
            }
        }
    }

    private init(_ thread: IOThread, _ place: TemporaryFolder) async throws(BlockError) {
        folder = place.path
        daemon = StorageDaemon(on: thread)
        try await place.makeFile("disk", size: Self.size, of: 0x11, on: thread)
        _ = try await daemon.execute(
            "nbd-server-start",
            ["addr": ["type": "unix", "data": ["path": .string("\(folder)/nbd.sock")]]])
        _ = try await daemon.execute(
            "blockdev-add",
            [
                "driver": "raw", "node-name": "disk", "discard": "unmap",
                "file": ["driver": "file", "filename": .string("\(folder)/disk")],
            ])
        _ = try await daemon.execute(
            "block-export-add",
            ["type": "nbd", "id": "guest", "node-name": "disk", "writable": true])
    }

    var session: FleeceSession {
        FleeceSession(
            of: "disk", exportName: nil, temporaryPath: "\(folder)/temp", executor: daemon)
    }

    /// What the guest's export would do for a client.
    func guestWrite(_ offset: Int, _ count: Int, _ value: UInt8) async throws(BlockError) {
        guard let edge = daemon.exports.first(where: { $0.identifier == "guest" })?.export.edge
        else {
            throw BlockError(.notFound, "no guest export")
        }
        try await edge.fill(ByteRange(offset, count), with: value)
    }

    func read(_ nodeName: String) async throws(BlockError) -> Set<UInt8> {
        let node = try daemon.graph.requireNode(named: nodeName)
        let edge = try daemon.graph.attach(NamedUser("reader"), to: node, .read)
        let found = try await edge.contents(of: ByteRange(0, Self.size))
        try await daemon.graph.detach(edge)
        return Set(found)
    }

    func nodeNames() -> Set<String> {
        Set(daemon.graph.nodes.map(\.name).filter { !$0.hasPrefix("#") })
    }
}

/// A daemon that sees other files than its client: `elsewhere` where the client says `temp`.
private final class OtherFolders: QMPExecutor, @unchecked Sendable {
    private let test: TestDaemon

    init(_ test: TestDaemon) {
        self.test = test
    }

    var thread: IOThread { test.daemon.thread }

    func execute(
        _ command: String, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        guard case .object(var object) = arguments, object["filename"] != nil else {
            return try await test.daemon.execute(command, arguments)
        }
        object["filename"] = .string("\(test.folder)/elsewhere")
        return try await test.daemon.execute(command, .object(object))
    }
}

/// A daemon that has something else done before the command with this number.
private final class Interleaved: QMPExecutor, @unchecked Sendable {
    private let daemon: StorageDaemon
    private let number: Int
    private let other: () async -> Void
    private var count = 0

    init(_ daemon: StorageDaemon, before number: Int, _ other: @escaping () async -> Void) {
        self.daemon = daemon
        self.number = number
        self.other = other
    }

    var thread: IOThread { daemon.thread }

    func execute(
        _ command: String, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        count += 1
        if count == number + 1 { await other() }
        return try await daemon.execute(command, arguments)
    }
}

@Suite struct FleeceSessionTests {
    /// Two sessions begin a view of one disk, the second between two commands of the first.
    @Test(arguments: 0..<9)
    func oneOfTwoSessionsAtATimeGetsTheViewAndKeepsIt(number: Int) async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            var messages: [String] = []
            let executor = Interleaved(test.daemon, before: number) {
                do throws(BlockError) { try await test.session.begin(.init()) } catch {
                    messages.append(error.message)
                }
            }
            let slow = FleeceSession(
                of: "disk", exportName: nil, temporaryPath: "\(test.folder)/slow",
                executor: executor)
            do throws(BlockError) { try await slow.begin(.init()) } catch {
                messages.append(error.message)
            }
            try await test.guestWrite(0, 4096, 0x22)
            let frozen = try await test.read("fleece-disk-frozen")
            let held = try await test.session.knownTemporaryPath()
            var files: [String] = []
            for path in ["\(test.folder)/temp", "\(test.folder)/slow"]
            where access(path, F_OK) == 0 { files.append(path) }
            try await test.session.end()
            return (messages, frozen, held, files, test.nodeNames())
        }
        #expect(seen.0.count == 1, "\(seen.0.joined(separator: ", "))")
        #expect(seen.1 == [0x11])
        #expect(seen.3.count == 1 && seen.3.first == seen.2)
        #expect(seen.4 == ["disk"])
    }

    @Test func whoLosesTheRaceForAViewIsToldThatItIsHeld() async throws {
        let message = try await TestDaemon.run { test throws(BlockError) in
            // The first command looks whether the names are free.
            let executor = Interleaved(test.daemon, before: 1) {
                try? await test.session.begin(.init())
            }
            let slow = FleeceSession(
                of: "disk", exportName: nil, temporaryPath: "\(test.folder)/slow",
                executor: executor)
            do throws(BlockError) { try await slow.begin(.init()) } catch {
                return error.message
            }
            return "begun"
        }
        #expect(message.contains("held already"))
    }

    @Test func aDaemonThatSeesAnotherFileDoesNotWriteToIt() async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            let path = "\(test.folder)/elsewhere"
            defer { unlink(path) }
            let file = try await File.open(
                path, FileOptions(writable: true, create: true), on: test.daemon.thread)
            let data = try IOVector(allocating: 4096)
            data.fill(7)
            try await file.write(data, at: 0)
            let session = FleeceSession(
                of: "disk", exportName: nil, temporaryPath: "\(test.folder)/temp",
                executor: OtherFolders(test))
            var message = ""
            do throws(BlockError) { try await session.begin(.init()) } catch {
                message = error.description
            }
            data.fill(0)
            let count = try await file.read(data, at: 0)
            await file.close()
            return (message, count, Set(data.array), test.nodeNames())
        }
        #expect(seen.0.contains("sees another file"))
        #expect(seen.1 == 4096 && seen.2 == [7])
        #expect(seen.3 == ["disk"])
    }

    @Test func theFrozenViewStaysWhileTheGuestWrites() async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            let session = test.session
            try await session.begin(.init())
            try await test.guestWrite(0, TestDaemon.size, 0x22)
            let frozen = try await test.read("fleece-disk-frozen")
            let copied = try await session.progress().copiedBytes
            try await session.end()
            let live = try await test.read("disk")
            return (frozen, copied, live, test.nodeNames())
        }
        #expect(seen.0 == [0x11])
        #expect(seen.1 == TestDaemon.size)
        #expect(seen.2 == [0x22])
        #expect(seen.3 == ["disk"])
    }

    @Test func aFailedSetUpLeavesNothingBehind() async throws {
        let result = try await TestDaemon.run { test throws(BlockError) in
            // The name of the frozen export is taken: the last step fails.
            let session = FleeceSession(
                of: "disk", exportName: "disk", temporaryPath: "\(test.folder)/temp",
                executor: test.daemon)
            var message = ""
            do throws(BlockError) { try await session.begin(.init()) } catch {
                message = error.description
            }
            try await test.guestWrite(0, 4096, 0x33)
            return (message, test.nodeNames())
        }
        #expect(result.0.contains("already"))
        #expect(result.1 == ["disk"])
    }

    @Test func aSecondViewOfTheDiskIsRefusedAndTheFirstStays() async throws {
        let result = try await TestDaemon.run { test throws(BlockError) in
            try await test.session.begin(.init())
            var code = BlockError.Code.busy
            do throws(BlockError) { try await test.session.begin(.init()) } catch {
                code = error.code
            }
            try await test.guestWrite(0, 4096, 0x44)
            let frozen = try await test.read("fleece-disk-frozen")
            try await test.session.end()
            return (code, frozen)
        }
        #expect(result.0 == .alreadyExists)
        #expect(result.1 == [0x11])
    }

    @Test func aDiskWithSeveralExportsIsFrozenForAll() async throws {
        let nodes = try await TestDaemon.run { test throws(BlockError) in
            for (name, writable) in [("second", true), ("third", false)] {
                _ = try await test.daemon.execute(
                    "block-export-add",
                    [
                        "type": "nbd", "id": .string(name), "node-name": "disk",
                        "name": .string(name), "writable": .bool(writable),
                    ])
            }
            func below() -> [String] {
                test.daemon.exports.compactMap { $0.export.edge?.node.name }
            }
            try await test.session.begin(.init())
            let during = below()
            try await test.session.end()
            return during + ["|"] + below()
        }
        let filter = "fleece-disk-filter"
        #expect(
            nodes == [filter, filter, filter, "fleece-disk-frozen", "|", "disk", "disk", "disk"])
    }

    @Test func viewsOfDisksWithLongNamesAreToldApart() async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let daemon = try await thread.run { () async throws(BlockError) in StorageDaemon(on: thread)
        }
        let names = ["virtio-disk-data-1", "virtio-disk-data-2", "#block001", "ä"].map {
            FleeceSession(of: $0, exportName: nil, temporaryPath: "", executor: daemon).filterName
        }
        #expect(Set(names).count == names.count)
        #expect(names.allSatisfy { $0.utf8.count <= Limits.nodeNameLengthMax })
    }

    @Test func anUnknownDiskNamesThoseThereAre() async throws {
        let remedy = try await TestDaemon.run { test throws(BlockError) in
            let session = FleeceSession(
                of: "dsik", exportName: nil, temporaryPath: "\(test.folder)/temp",
                executor: test.daemon)
            do throws(BlockError) { try await session.begin(.init()) } catch {
                return error.remedy ?? ""
            }
            return "begun"
        }
        #expect(remedy.contains("disk"))
    }

    @Test func anotherProcessCanEndTheView() async throws {
        let names = try await TestDaemon.run { test throws(BlockError) in
            try await test.session.begin(.init())
            // A session made anew knows everything from the disk's name.
            let other = test.session
            #expect(try await other.isActive())
            #expect(try await other.knownTemporaryPath() == "\(test.folder)/temp")
            try await other.end()
            #expect(try await !other.isActive())
            return test.nodeNames()
        }
        #expect(names == ["disk"])
    }

    @Test(arguments: ["filter", "frozen", "temp", "new"])
    func aNodeThatOnlyHasANameOfTheViewStays(part: String) async throws {
        let name = "fleece-disk-\(part)"
        let seen = try await TestDaemon.run { test throws(BlockError) in
            _ = try await test.daemon.execute(
                "blockdev-add", ["driver": "null-co", "node-name": .string(name)])
            var messages: [String] = []
            do throws(BlockError) { try await test.session.begin(.init()) } catch {
                messages.append(error.message)
            }
            do throws(BlockError) { try await test.session.end() } catch {
                messages.append(error.message)
            }
            do throws(BlockError) { _ = try await test.session.isActive() } catch {
                messages.append(error.message)
            }
            return (messages, test.nodeNames())
        }
        let isFilter = part == "filter"
        #expect(seen.0.count == (isFilter ? 3 : 1))
        #expect(seen.0.first?.contains("there is a node '\(name)' already") == true)
        #expect(seen.0.dropFirst().allSatisfy { $0.contains("is not of a frozen view") })
        #expect(seen.1 == ["disk", name])
    }

    @Test func aTransactionThatFailsHalfWayUndoesWhatItDid() async throws {
        let result = try await TestDaemon.run { test throws(BlockError) in
            var failed = false
            do throws(BlockError) {
                _ = try await test.daemon.execute(
                    "transaction",
                    [
                        "actions": [
                            [
                                "type": "blockdev-add",
                                "data": ["driver": "raw", "node-name": "top", "file": "disk"],
                            ],
                            [
                                "type": "blockdev-replace",
                                "data": [
                                    "parent-type": "export", "export-id": "guest",
                                    "new-child": "top",
                                ],
                            ], ["type": "abort", "data": [:]],
                        ]
                    ])
            } catch { failed = true }
            let below = test.daemon.exports.first?.export.edge?.node.name
            try await test.guestWrite(0, 4096, 1)
            return (failed, below, test.nodeNames())
        }
        #expect(result.0)
        #expect(result.1 == "disk")
        #expect(result.2 == ["disk"])
    }

    @Test func aQMPServerThatDoesNotGreetIsNotWaitedForWithoutEnd() async throws {
        let place = try TemporaryFolder()
        defer { place.remove() }
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let error = try await thread.run { () async throws(BlockError) -> BlockError? in
            let address = SocketAddress.unix(path: "\(place.path)/silent")
            let silent = try Listener(on: address, thread: thread)
            defer { silent.close() }
            do throws(BlockError) {
                _ = try await QMPClient.connect(
                    to: address, on: thread, nanosecondsMax: 1_000_000)
                return nil
            } catch { return error }
        }
        #expect(error?.code == .timedOut)
        #expect(error?.message.contains("silent") == true)
    }

    @Test func theURIOfAServerThatNeedsTLSSaysSo() async throws {
        let uris = try await TestDaemon.run { test throws(BlockError) in
            let before = try await FleeceSession.address(
                of: "x", socket: nil, executor: test.daemon)
            _ = try await test.daemon.execute("nbd-server-stop", [:])
            _ = try await test.daemon.execute(
                "object-add", ["qom-type": "tls-creds-anon", "id": "t", "endpoint": "server"])
            _ = try await test.daemon.execute(
                "nbd-server-start",
                [
                    "addr": [
                        "type": "inet", "data": ["host": "127.0.0.1", "port": "0"],
                    ], "tls-creds": "t",
                ])
            let after = try await FleeceSession.address(
                of: "x", socket: nil, executor: test.daemon)
            return (before.uri, after.uri)
        }
        #expect(uris.0.hasPrefix("nbd+unix:///x?socket="))
        #expect(uris.1.hasPrefix("nbds://127.0.0.1:"))
    }

    @Test func aUnixSocketsURISaysThatTLSIsNeeded() throws {
        let uri = try NBDURI.text(
            address: ["type": "unix", "path": "/run/n"], export: "x", needsTLS: true)
        #expect(uri == "nbds+unix:///x?socket=/run/n")
    }

    @Test func aServerThatOthersUseIsNotStoppedWithTheView() async throws {
        let isThere = try await TestDaemon.run { test throws(BlockError) in
            var isThere: [Bool] = []
            try await FleeceSession.stopServer(test.daemon)
            isThere.append(
                try await test.daemon.execute("x-query-nbd-server", [:]) != .null)
            _ = try await test.daemon.execute("block-export-del", ["id": "guest"])
            try await FleeceSession.stopServer(test.daemon)
            isThere.append(
                try await test.daemon.execute("x-query-nbd-server", [:]) != .null)
            return isThere
        }
        #expect(isThere == [true, false])
    }

    @Test func aNodeBelowTheOneThatIsExportedIsRefusedWithThatOnesName() async throws {
        let seen = try await TestDaemon.run { test throws(BlockError) in
            let options: [JSONValue] = [
                ["driver": "null-co", "node-name": "low", "size": 1_048_576],
                ["driver": "raw", "node-name": "middle", "file": "low"],
                ["driver": "raw", "node-name": "top", "file": "middle"],
            ]
            for option in options { _ = try await test.daemon.execute("blockdev-add", option) }
            _ = try await test.daemon.execute(
                "block-export-add",
                ["type": "nbd", "id": "t", "node-name": "top", "writable": true])
            let session = FleeceSession(
                of: "low", exportName: nil, temporaryPath: "\(test.folder)/temp",
                executor: test.daemon)
            var text = ""
            do throws(BlockError) { try await session.begin(.init()) } catch {
                text = error.description
            }
            return (text, access("\(test.folder)/temp", F_OK), test.nodeNames())
        }
        #expect(seen.0.contains("'low' is used by node 'middle'"))
        #expect(seen.0.hasSuffix("freeze 'top' instead"))
        #expect(seen.1 != 0)
        #expect(seen.2 == ["disk", "low", "middle", "top"])
    }
}
