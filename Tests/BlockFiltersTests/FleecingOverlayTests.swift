import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import QMP
import Testing

#if canImport(Glibc)
import Glibc
#endif

@Suite struct FleecingOverlayTests {
    /// A disk whose data is all in its backing image: copied from the status, it must not become a hole.
    @Test func statusOfTheSnapshotKnowsTheBackingImagesData() async throws {
        let folder = "/tmp/merino-overlay-\(getpid())-\(UInt64.random(in: 0 ... .max))"
        mkdir(folder, 0o700)
        defer {
            for name in ["base", "disk", "temp"] { unlink("\(folder)/\(name)") }
            rmdir(folder)
        }
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let flags = try await thread.run { () async throws(BlockError) -> ExtentFlags in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(
                    BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers))
            let size = 1 << 20
            try await Self.makeFile("\(folder)/base", size: size, fill: 0xaa, thread)
            try await Self.makeFile("\(folder)/temp", size: size, fill: nil, thread)
            try await Self.makeFile("\(folder)/disk", size: 0, fill: nil, thread)
            try await Self.createOverlay("\(folder)/disk", size: size, graph)

            func file(_ name: String) -> JSONValue {
                ["driver": "file", "filename": .string("\(folder)/\(name)")]
            }
            let nodes: [JSONValue] = [
                ["driver": "raw", "node-name": "temp", "file": file("temp")],
                [
                    "driver": "qcow2", "node-name": "disk", "file": file("disk"),
                    "backing": ["driver": "raw", "read-only": true, "file": file("base")],
                ],
                [
                    "driver": "copy-before-write", "node-name": "cbw", "file": "disk",
                    "target": "temp",
                ],
                ["driver": "snapshot-access", "node-name": "snap", "file": "cbw"],
            ]
            for node in nodes { _ = try await graph.open(node, monitorOwned: true) }
            let snapshot = try graph.attach(
                NamedUser("backup"), to: try graph.requireNode(named: "snap"), .read)
            let status = try await snapshot.chainStatus(ByteRange(0, size))
            try await graph.detach(snapshot)
            try await graph.closeAll()
            return status.flags
        }
        #expect(flags.contains(.data))
        #expect(!flags.contains(.zero))
    }

    private static func makeFile(
        _ path: String, size: Int, fill: UInt8?, _ thread: IOThread
    ) async throws(BlockError) {
        let file = try await File.open(path, FileOptions(writable: true, create: true), on: thread)
        try await file.setSize(size)
        if let fill {
            let data = try IOVector(allocating: size)
            data.fill(fill)
            try await file.write(data, at: 0)
        }
        await file.close()
    }

    private static func createOverlay(
        _ path: String, size: Int, _ graph: BlockGraph
    ) async throws(BlockError) {
        let options: JSONValue = [
            "file": ["driver": "file", "filename": .string(path)],
            "size": .integer(size), "backing-file": "base", "backing-fmt": "raw",
        ]
        let reader = try OptionReader(options, of: "creation")
        let description = try graph.registry.driver(named: "qcow2")
        let creation = ImageCreation(graph, options: reader)
        try await description.create?(creation)
        try await creation.finish()
    }
}
