import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// A graph of the daemon's drivers, with its images in a private folder.
final class ReopeningFolder: Sendable {
    private let folder: TemporaryFolder
    var path: String { folder.path }

    init() throws { folder = try TemporaryFolder() }

    deinit { folder.remove() }

    subscript(name: String) -> String { folder[name] }

    /// - Returns: the exit status.
    @discardableResult
    func run(_ arguments: String...) throws -> Int32 {
        try ChildProgram.run(arguments.map { $0.replacingOccurrences(of: "$", with: path) }).status
    }

    func image(_ name: String, _ arguments: String..., size: String = "1M") throws {
        let result = try ChildProgram.run(
            ["qemu-img", "create", "-q"] + arguments + [self[name], size])
        try #require(result.status == 0, "\(result.errors)")
    }

    func graph<T: Sendable>(
        _ body: @escaping @Sendable (BlockGraph) async throws(BlockError) -> T
    ) async throws -> T {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> T in
            let graph = BlockGraph(on: thread, registry: StorageDaemon.registry)
            let result: Result<T, BlockError>
            do throws(BlockError) {
                result = .success(try await body(graph))
            } catch {
                result = .failure(error)
            }
            try await graph.closeAll()
            return try result.get()
        }
    }

    /// `node` is a qcow2 image with its file opened with it.
    func qcow2(_ name: String, _ more: JSONObject = [:]) -> JSONValue {
        var options: JSONObject = [
            "driver": "qcow2", "node-name": .string(name),
            "file": ["driver": "file", "filename": .string(self[name])],
        ]
        for (key, value) in more.members { options[key] = value }
        return .object(options)
    }

    func file(_ name: String, _ more: JSONObject = [:]) -> JSONValue {
        var options: JSONObject = [
            "driver": "file", "node-name": .string(name), "filename": .string(self[name]),
        ]
        for (key, value) in more.members { options[key] = value }
        return .object(options)
    }
}

extension BlockGraph {
    /// - Returns: why the reopening was refused.
    func refusal(_ list: [JSONValue]) async -> String {
        do throws(BlockError) {
            try await reopen(list)
            return "not refused"
        } catch {
            return error.description
        }
    }

    /// Runs `body` as a user of a node.
    func using<T>(
        _ name: String, writing: Bool = false,
        _ body: (Edge) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let edge = try attach(
            NamedUser("the test"), to: try requireNode(named: name),
            Access(uses: writing ? [.consistentRead, .write] : .consistentRead, shares: .all))
        let result: Result<T, BlockError>
        do throws(BlockError) {
            result = .success(try await body(edge))
        } catch {
            result = .failure(error)
        }
        try await detach(edge)
        return try result.get()
    }

    func fill(_ name: String, _ byte: UInt8, at offset: Int = 0) async throws(BlockError) {
        try await using(name, writing: true) { edge throws(BlockError) in
            try await edge.fill(ByteRange(offset, 4096), with: byte)
        }
    }

    func byte(_ name: String, at offset: Int = 0) async throws(BlockError) -> UInt8 {
        try await using(name) { edge throws(BlockError) in
            try await edge.contents(of: ByteRange(offset, 4096))[0]
        }
    }
}

/// Open nodes take other options: `blockdev-reopen`.
@Suite struct ReopeningTests {
    @Test func aReadOnlyImageBecomesWritableAndReadOnlyAgain() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "qcow2")
        try await folder.graph { graph throws(BlockError) in
            _ = try await graph.open(
                folder.qcow2("a", ["read-only": true]), monitorOwned: true)
            try await graph.reopen([folder.qcow2("a")])
            try await graph.fill("a", 7)
            try await graph.reopen([folder.qcow2("a", ["read-only": true])])
            #expect(try await graph.byte("a") == 7)
            do throws(BlockError) {
                try await graph.fill("a", 8)
                Issue.record("a read-only node was written")
            } catch { #expect(error.code == .readOnly) }
            // Nothing is left to be written at the end: another process finds all of it.
            #expect((try? folder.run("qemu-img", "check", "$/a")) == 0)
            #expect((try? folder.run("qemu-io", "-r", "-c", "read -P 7 0 4k", "$/a")) == 0)
        }
    }

    /// Images below that were opened by the names in those above them stay as they are.
    @Test func aChainIsReopenedByItsTop() async throws {
        let folder = try ReopeningFolder()
        try folder.image("base", "-f", "qcow2")
        try folder.run("qemu-io", "-c", "write -P 3 0 4k", "$/base")
        try folder.image("low", "-f", "qcow2", "-b", "base", "-F", "qcow2")
        try folder.image("middle", "-f", "qcow2", "-b", "low", "-F", "qcow2")
        try folder.image("top", "-f", "qcow2", "-b", "middle", "-F", "qcow2")
        try await folder.graph { graph throws(BlockError) in
            _ = try await graph.open(folder.qcow2("top"), monitorOwned: true)
            guard let backing = try graph.requireNode(named: "top").backing?.node.name else {
                throw BlockError(.notFound, "no backing image")
            }
            for isReadOnly in [true, false, true] {
                let options: JSONObject = [
                    "backing": .string(backing), "read-only": .bool(isReadOnly),
                ]
                try await graph.reopen([folder.qcow2("top", options)])
                #expect(try graph.requireNode(named: "top").isReadOnly == isReadOnly)
                #expect(try await graph.byte("top") == 3)
            }
            #expect(try graph.requireNode(named: backing).isReadOnly)
        }
    }

    @Test func locksFollowTheMode() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "raw")
        try await folder.graph { graph throws(BlockError) in
            let write = ["qemu-io", "-f", "raw", "-c", "write 0 4k", "$/a"]
            func isLockedForWriting() -> Bool {
                (try? folder.run(write[0], write[1], write[2], write[3], write[4], write[5])) != 0
            }
            let raw: JSONObject = ["driver": "raw", "node-name": "r"]
            func options(_ file: JSONObject, _ own: JSONObject = [:]) -> JSONValue {
                var all = raw
                all["file"] = folder.file("a", file)
                for (key, value) in own.members { all[key] = value }
                return .object(all)
            }
            _ = try await graph.open(
                options([:], ["read-only": true, "force-share": true]), monitorOwned: true)
            let edge = try graph.attach(
                NamedUser("reader"), to: try graph.requireNode(named: "r"),
                Access(uses: .consistentRead, shares: []))
            #expect(!isLockedForWriting())
            try await graph.reopen([options([:], ["read-only": true])])
            #expect(isLockedForWriting())
            try await graph.reopen([options([:])])
            #expect(isLockedForWriting())
            try await graph.reopen([options(["locking": "off"])])
            #expect(!isLockedForWriting())
            try await graph.reopen([options([:])])
            #expect(isLockedForWriting())
            try await graph.detach(edge)
        }
    }

    @Test func oneNodeThatCannotLeavesAllAsTheyWere() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "qcow2")
        try folder.image("b", "-f", "raw")
        try await folder.graph { graph throws(BlockError) in
            for options in [folder.qcow2("a"), folder.file("b")] {
                _ = try await graph.open(options, monitorOwned: true)
            }
            try await graph.fill("a", 1)
            let why = await graph.refusal([
                folder.qcow2("a", ["read-only": true]), folder.file("b", ["filename": "/else"]),
            ])
            #expect(why.contains("'filename'"))
            #expect(!(try graph.requireNode(named: "a").isReadOnly))
            try await graph.fill("a", 2)
            let twice = await graph.refusal([folder.file("b"), folder.file("b")])
            #expect(twice.contains("twice"))
            let unknown = await graph.refusal([folder.qcow2("a", ["l2-cash-size": 65536])])
            #expect(unknown.contains("l2-cache-size"))
            #expect(try await graph.byte("a") == 2)
        }
        #expect(try folder.run("qemu-img", "check", "$/a") == 0)
        #expect(try folder.run("qemu-io", "-c", "read -P 2 0 4k", "$/a") == 0)
    }

    @Test func aWriterKeepsItsNodeFromBecomingReadOnly() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "qcow2")
        try await folder.graph { graph throws(BlockError) in
            _ = try await graph.open(folder.qcow2("a"), monitorOwned: true)
            try await graph.using("a", writing: true) { edge throws(BlockError) in
                let why = await graph.refusal([folder.qcow2("a", ["read-only": true])])
                #expect(why.contains("the test"))
                let vector = try IOVector(allocating: 512)
                vector.fill(3)
                try await edge.write(0, from: vector)
            }
            #expect(try await graph.byte("a") == 3)
        }
    }

    @Test func writesGoOnWhileCachesAndModesChange() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "qcow2", "-o", "cluster_size=4k", size: "8M")
        let blockCount = 2048
        try await folder.graph { graph throws(BlockError) in
            _ = try await graph.open(folder.qcow2("a"), monitorOwned: true)
            let variants: [JSONObject] = [
                ["cache": ["direct": true]], ["l2-cache-size": 4096, "lazy-refcounts": true],
                ["cache": ["no-flush": true], "discard": "unmap", "detect-zeroes": "unmap"],
                ["refcount-cache-size": 8192, "overlap-check": "none"], [:],
            ]
            let edge = try graph.attach(
                NamedUser("writer"), to: try graph.requireNode(named: "a"),
                Access(uses: [.consistentRead, .write], shares: .all))
            let writer = graph.thread.spawn {
                do throws(BlockError) {
                    let vector = try IOVector(allocating: 4096)
                    for block in 0..<blockCount {
                        vector.fill(UInt8(1 + block % 251))
                        try await edge.write(block * 4096, from: vector)
                        if block % 64 == 0 { try await edge.flush() }
                    }
                } catch { Issue.record(error) }
            }
            for round in 0..<20 {
                try await graph.reopen([folder.qcow2("a", variants[round % variants.count])])
                await graph.thread.yield()
            }
            await writer.value
            let vector = try IOVector(allocating: 4096)
            for block in 0..<blockCount {
                try await edge.read(block * 4096, into: vector)
                #expect(vector.array.allSatisfy { $0 == UInt8(1 + block % 251) }, "\(block)")
            }
            try await graph.detach(edge)
        }
        #expect(try folder.run("qemu-img", "check", "$/a") == 0)
    }

    @Test func directInputAndOutputComesAndGoesWithItsAlignment() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "raw")
        try await folder.graph { graph throws(BlockError) in
            let node = try await graph.open(folder.file("a"), monitorOwned: true)
            #expect(node.limits.requestAlignment == 1)
            try await graph.reopen([folder.file("a", ["cache": ["direct": true]])])
            #expect(node.options.isDirect)
            #expect(node.limits.memoryAlignment > 1)
            try await graph.fill("a", 9, at: 512)
            #expect(try await graph.byte("a", at: 512) == 9)
            try await graph.reopen([folder.file("a")])
            #expect(node.limits.requestAlignment == 1)
            #expect(try await graph.byte("a", at: 512) == 9)
        }
    }

    // MARK: Children

    @Test func backingComesAndGoesAndHasToBeNamed() async throws {
        let folder = try ReopeningFolder()
        for name in ["one", "two", "top"] { try folder.image(name, "-f", "qcow2") }
        try await folder.graph { graph throws(BlockError) in
            for (name, byte) in [("one", UInt8(1)), ("two", 2)] {
                _ = try await graph.open(folder.qcow2(name), monitorOwned: true)
                try await graph.fill(name, byte)
            }
            _ = try await graph.open(folder.qcow2("top"), monitorOwned: true)
            #expect(try await graph.byte("top") == 0)
            try await graph.reopen([folder.qcow2("top", ["backing": "one"])])
            #expect(try await graph.byte("top") == 1)
            try await graph.reopen([folder.qcow2("top", ["backing": "two"])])
            #expect(try await graph.byte("top") == 2)
            #expect(await graph.refusal([folder.qcow2("top")]).contains("'backing'"))
            let loop = await graph.refusal([folder.qcow2("two", ["backing": "top"])])
            #expect(loop.contains("loop"))
            try await graph.reopen([folder.qcow2("top", ["backing": .null])])
            #expect(try await graph.byte("top") == 0)
            #expect(try graph.requireNode(named: "two").parents.isEmpty)
        }
    }

    /// Images `one` and `two` with a byte of their own, and `top` over `one`, all open.
    private static func openOverlay(
        _ folder: ReopeningFolder, in graph: BlockGraph
    ) async throws(BlockError) {
        for (name, byte) in [("one", UInt8(1)), ("two", 2)] {
            _ = try await graph.open(folder.qcow2(name), monitorOwned: true)
            try await graph.fill(name, byte)
        }
        _ = try await graph.open(folder.qcow2("top", ["backing": "one"]), monitorOwned: true)
    }

    @Test func aSnapshotThatIsReadKeepsTheBackingThatItReads() async throws {
        let folder = try ReopeningFolder()
        for name in ["one", "two", "top"] { try folder.image(name, "-f", "qcow2") }
        try #require(try folder.run("qemu-img", "snapshot", "-c", "s", "$/top") == 0)
        try await folder.graph { graph throws(BlockError) in
            func filter(over node: JSONValue) -> JSONValue {
                ["driver": "blkdebug", "node-name": "filter", "image": node]
            }
            try await Self.openOverlay(folder, in: graph)
            _ = try await graph.open(filter(over: "one"), monitorOwned: true)
            let view = try await graph.open(
                [
                    "driver": "snapshot-access", "node-name": "view", "file": "top",
                    "snapshot-name": "s",
                ], monitorOwned: true)
            for backing in ["two", .null] as [JSONValue] {
                let why = await graph.refusal([folder.qcow2("top", ["backing": backing])])
                #expect(why.contains("'view' reads a snapshot"), "\(why)")
            }
            #expect(try await graph.byte("view") == 1)
            // The same bytes, by way of a filter; they stay the same below that, too.
            try await graph.reopen([folder.qcow2("top", ["backing": "filter"])])
            let below = await graph.refusal([filter(over: "two")])
            #expect(below.contains("'view' reads a snapshot"), "\(below)")
            #expect(try await graph.byte("view") == 1)
            try await graph.remove(view)
            try await graph.reopen([folder.qcow2("top", ["backing": "two"])])
            #expect(try await graph.byte("top") == 2)
        }
    }

    @Test func aFrozenViewKeepsTheBackingOfItsDisk() async throws {
        let folder = try ReopeningFolder()
        for name in ["one", "two", "top"] { try folder.image(name, "-f", "qcow2") }
        try folder.image("temp", "-f", "raw")
        try await folder.graph { graph throws(BlockError) in
            try await Self.openOverlay(folder, in: graph)
            _ = try await graph.open(folder.file("temp"), monitorOwned: true)
            let filter = try await graph.open(
                [
                    "driver": "copy-before-write", "node-name": "cbw", "file": "top",
                    "target": "temp",
                ], monitorOwned: true)
            let view = try await graph.open(
                ["driver": "snapshot-access", "node-name": "view", "file": "cbw"],
                monitorOwned: true)
            let why = await graph.refusal([folder.qcow2("top", ["backing": "two"])])
            #expect(why.contains("its snapshot has data in 'top'"), "\(why)")
            #expect(try await graph.byte("view") == 1)
            try await graph.remove(view)
            try await graph.remove(filter)
            try await graph.reopen([folder.qcow2("top", ["backing": "two"])])
            #expect(try await graph.byte("top") == 2)
        }
    }

    @Test func aFilterBelowAFormatGetsNoOtherFile() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "qcow2")
        try folder.image("b", "-f", "raw")
        try await folder.graph { graph throws(BlockError) in
            for name in ["a", "b"] {
                _ = try await graph.open(
                    .object([
                        "driver": "file", "node-name": .string("\(name)-file"),
                        "filename": .string(folder[name]),
                    ]), monitorOwned: true)
            }
            func filter(over node: JSONValue) -> JSONValue {
                ["driver": "blkdebug", "node-name": "filter", "image": node]
            }
            _ = try await graph.open(filter(over: "a-file"), monitorOwned: true)
            _ = try await graph.open(
                ["driver": "qcow2", "node-name": "a", "file": "filter"], monitorOwned: true)
            let why = await graph.refusal([filter(over: "b-file")])
            #expect(why.contains("has its metadata in 'filter'"), "\(why)")
        }
    }

    @Test func aWindowBelowAFrozenViewStaysWhereItIs() async throws {
        let folder = try ReopeningFolder()
        try await folder.graph { graph throws(BlockError) in
            func window(at offset: Int) -> JSONValue {
                [
                    "driver": "raw", "node-name": "window", "file": "whole",
                    "offset": .integer(offset), "size": 65536,
                ]
            }
            for (name, size) in [("whole", 1 << 20), ("temp", 65536)] {
                _ = try await graph.open(
                    ["driver": "null-co", "node-name": .string(name), "size": .integer(size)],
                    monitorOwned: true)
            }
            _ = try await graph.open(window(at: 0), monitorOwned: true)
            let filter = try await graph.open(
                [
                    "driver": "copy-before-write", "node-name": "cbw", "file": "window",
                    "target": "temp",
                ], monitorOwned: true)
            let view = try await graph.open(
                ["driver": "snapshot-access", "node-name": "view", "file": "cbw"],
                monitorOwned: true)
            let why = await graph.refusal([window(at: 65536)])
            #expect(why.contains("its snapshot has data in 'window'"), "\(why)")
            try await graph.remove(view)
            try await graph.remove(filter)
            try await graph.reopen([window(at: 65536)])
        }
    }

    @Test func theFileBelowAFormatIsReplacedAndTheOldOneGoes() async throws {
        let folder = try ReopeningFolder()
        try folder.image("a", "-f", "qcow2")
        try await folder.graph { graph throws(BlockError) in
            _ = try await graph.open(folder.qcow2("a"), monitorOwned: true)
            try await graph.fill("a", 5)
            // The same file, by way of a raw node.
            _ = try await graph.open(
                [
                    "driver": "raw", "node-name": "way",
                    "file": .object([
                        "driver": "file", "filename": .string(folder["a"]), "locking": "off",
                    ]),
                ], monitorOwned: true)
            let before = graph.nodes.count
            try await graph.reopen([
                ["driver": "qcow2", "node-name": "a", "file": "way"]
            ])
            #expect(graph.nodes.count == before - 1)
            #expect(try await graph.byte("a") == 5)
            try await graph.fill("a", 6, at: 65536)
            let inline = await graph.refusal([folder.qcow2("a")])
            #expect(inline.contains("its own"))
        }
        #expect(try folder.run("qemu-img", "check", "$/a") == 0)
        #expect(try folder.run("qemu-io", "-c", "read -P 6 64k 4k", "$/a") == 0)
    }

    @Test func aFileThatAnotherHasTakenTheNameOfIsNotTaken() async throws {
        let folder = try ReopeningFolder()
        for name in ["a", "b"] { try folder.image(name, "-f", "raw") }
        try await folder.graph { graph throws(BlockError) in
            _ = try await graph.open(folder.file("a", ["read-only": true]), monitorOwned: true)
            rename(folder["b"], folder["a"])
            let why = await graph.refusal([folder.file("a")])
            #expect(why.contains("another file"))
            #expect(try await graph.byte("a") == 0)
        }
    }

    @Test func aSnapshotOutlivesAnotherPolicyForErrors() async throws {
        let folder = try ReopeningFolder()
        for name in ["disk", "temp"] { try folder.image(name, "-f", "raw") }
        try await folder.graph { graph throws(BlockError) in
            for name in ["disk", "temp"] {
                _ = try await graph.open(folder.file(name), monitorOwned: true)
            }
            try await graph.fill("disk", 1)
            func filter(_ more: JSONObject) -> JSONValue {
                var options: JSONObject = [
                    "driver": "copy-before-write", "node-name": "cbw", "file": "disk",
                    "target": "temp",
                ]
                for (key, value) in more.members { options[key] = value }
                return .object(options)
            }
            _ = try await graph.open(filter([:]), monitorOwned: true)
            _ = try await graph.open(
                ["driver": "snapshot-access", "node-name": "snap", "file": "cbw"],
                monitorOwned: true)
            let guest = try graph.attach(
                NamedUser("guest"), to: try graph.requireNode(named: "cbw"),
                Access(uses: [.consistentRead, .write], shares: .all))
            let vector = try IOVector(allocating: 4096)
            vector.fill(2)
            try await guest.write(0, from: vector)
            try await graph.reopen([filter(["on-cbw-error": "break-snapshot", "cbw-timeout": 9])])
            try await guest.write(65536, from: vector)
            #expect(try await graph.byte("snap") == 1)
            let other = await graph.refusal([filter(["min-cluster-size": 131072])])
            #expect(other.contains("min-cluster-size"))
            let target = await graph.refusal([filter(["target": "disk"])])
            #expect(target.contains("target"))
            try await graph.detach(guest)
        }
    }
}
