import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

@Suite struct FleecingOverlayTests {
    /// A disk whose data is all in its backing image: copied from the status, it must not become a hole.
    @Test func statusOfTheSnapshotKnowsTheBackingImagesData() async throws {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let drivers = BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers
        let flags = try await withGraph(of: drivers) { graph throws(BlockError) -> ExtentFlags in
            let size = 1 << 20
            try await folder.makeFile("base", size: size, of: 0xaa, on: graph.thread)
            try await folder.makeFile("temp", size: size, on: graph.thread)
            try await folder.makeFile("disk", size: 0, on: graph.thread)
            try await Self.createOverlay(folder["disk"], size: size, graph)

            func file(_ name: String) -> JSONValue {
                ["driver": "file", "filename": .string(folder[name])]
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
