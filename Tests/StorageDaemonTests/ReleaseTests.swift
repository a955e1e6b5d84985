import BlockCore
import BlockFilters
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockExports
@testable import BlockGraph
@testable import StorageDaemon

/// What is closed is not in memory any more.
@Suite struct ReleaseTests {
    private final class Weak: @unchecked Sendable {
        weak var object: AnyObject?
        let name: String
        init(_ object: AnyObject, _ name: String) {
            self.object = object
            self.name = name
        }
    }

    /// Options by driver; `$` stands for the folder with the raw images `a` and `b` and the qcow2 image `q`.
    private static let options: [String] = {
        let a = #""file":{"driver":"file","filename":"$/a"}"#
        let null = #"{"driver":"null-co","size":1048576}"#
        let cbw = #"{"driver":"copy-before-write",\#(a),"target":\#(null)}"#
        return [
            #"{"driver":"file","filename":"$/a"}"#, #"{"driver":"raw",\#(a)}"#, null,
            #"{"driver":"qcow2","file":{"driver":"file","filename":"$/q"}}"#, cbw,
            #"{"driver":"snapshot-access","file":\#(cbw)}"#,
            #"{"driver":"copy-on-read",\#(a)}"#, #"{"driver":"preallocate",\#(a)}"#,
            #"{"driver":"throttle","throttle-group":"group",\#(a)}"#,
            #"{"driver":"compress","file":{"driver":"qcow2","file":{"driver":"file","filename":"$/q"}}}"#,
            #"{"driver":"blkdebug","image":{"driver":"file","filename":"$/a"}}"#,
            #"{"driver":"blkverify","test":\#(null),"raw":{"driver":"null-co","size":1048576}}"#,
            #"{"driver":"blklogwrites",\#(a),"log":{"driver":"file","filename":"$/b"}}"#,
        ]
    }()

    private static func with<T: Sendable>(
        _ body: @escaping @Sendable (StorageDaemon, _ folder: String) async throws(BlockError) -> T
    ) async throws -> T {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> T in
            let daemon = StorageDaemon(on: thread)
            for (name, size) in [("a", 1 << 20), ("b", 1 << 20), ("q", 0)] {
                try await folder.makeFile(name, size: size, on: thread)
            }
            _ = try await daemon.execute(
                "blockdev-create",
                [
                    "job-id": "j",
                    "options": [
                        "driver": "qcow2", "size": 1_048_576,
                        "file": ["driver": "file", "filename": .string(folder["q"])],
                    ],
                ])
            await daemon.jobs.first?.task?.value
            _ = try await daemon.execute(
                "object-add", ["qom-type": "throttle-group", "id": "group"])
            return try await body(daemon, folder.path)
        }
    }

    private static func parse(_ text: String, _ folder: String) throws(BlockError) -> JSONValue {
        var text = text
        while let place = text.firstIndex(of: "$") {
            text.replaceSubrange(place...place, with: folder)
        }
        return try JSONParser.parse(text)
    }

    /// Opens, uses and closes a node; what there was of it and below it.
    private static func useOnce(
        _ options: JSONValue, in graph: BlockGraph
    ) async throws(BlockError) -> [Weak] {
        let node = try await graph.open(options)
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: [.consistentRead, .write], shares: .all))
        let data = try IOVector(allocating: 65536)
        data.fill(1)
        try? await edge.write(0, from: data)
        try await edge.read(0, into: data)
        try await edge.flush()
        var seen = [Weak(edge, "an edge")]
        for node in graph.nodes {
            seen.append(Weak(node, "the node of \(node.description.name)"))
            seen.append(Weak(node.driver, "the driver \(node.description.name)"))
        }
        node.release("opening")
        try await graph.detach(edge)
        return seen
    }

    @Test(arguments: options) func aClosedNodeIsFreed(options: String) async throws {
        let left = try await Self.with { daemon, folder throws(BlockError) in
            let graph = daemon.graph
            let parsed = try Self.parse(options, folder)
            let seen = try await Self.useOnce(parsed, in: graph)
            #expect(graph.nodes.isEmpty)
            for _ in 0..<10 { await graph.thread.yield() }
            return seen.filter { $0.object != nil }.map(\.name)
        }
        #expect(left == [])
    }

    @Test func aNodeThatDidNotOpenIsFreed() async throws {
        let left = try await Self.with { daemon, folder throws(BlockError) in
            var seen: [Weak] = []
            for text in [
                #"{"driver":"raw","bogus":1,"file":{"driver":"file","filename":"$/a"}}"#,
                #"{"driver":"qcow2","file":{"driver":"file","filename":"$/a"}}"#,
                #"{"driver":"copy-before-write","file":{"driver":"file","filename":"$/a"},"target":"none"}"#,
            ] {
                let options = try Self.parse(text, folder)
                // Where the file is there before the task waits for it, nobody sees the nodes: once more then.
                for _ in 0..<1000 {
                    let opening = daemon.graph.thread.spawn {
                        do throws(BlockError) {
                            _ = try await daemon.graph.open(options)
                            Issue.record("it opened")
                        } catch {}
                    }
                    let nodes = daemon.graph.nodes
                    seen += nodes.map { Weak($0, "\($0.description.name) of \(text)") }
                    await opening.value
                    if !nodes.isEmpty { break }
                }
            }
            #expect(!seen.isEmpty && daemon.graph.nodes.isEmpty)
            for _ in 0..<10 { await daemon.graph.thread.yield() }
            return seen.filter { $0.object != nil }.map(\.name)
        }
        #expect(left == [])
    }

    private static func exportOnce(_ graph: BlockGraph) async throws(BlockError) -> [Weak] {
        let node = try await graph.open(["driver": "null-co", "size": 1_048_576])
        let export = try NBDExport(name: "x", node: node, writable: true)
        var seen = [Weak(export, "the export"), Weak(node, "the node")]
        if let edge = export.edge { seen.append(Weak(edge, "the edge")) }
        node.release("opening")
        try await export.close()
        return seen
    }

    @Test func aClosedExportIsFreed() async throws {
        let left = try await Self.with { daemon, _ throws(BlockError) in
            let seen = try await Self.exportOnce(daemon.graph)
            for _ in 0..<10 { await daemon.graph.thread.yield() }
            return seen.filter { $0.object != nil }.map(\.name)
        }
        #expect(left == [])
    }

    @Test func aRequestOnAClosedNodeIsAnError() async throws {
        let code = try await Self.with { daemon, _ throws(BlockError) -> BlockError.Code? in
            let graph = daemon.graph
            let node = try await graph.open(["driver": "null-co", "node-name": "n"])
            node.release("opening")
            try await graph.collect()
            let data = try IOVector(allocating: 512)
            do throws(BlockError) { try await node.driver.read(0, into: data, []) } catch {
                return error.code
            }
            return nil
        }
        #expect(code == .disconnected)
    }
}
