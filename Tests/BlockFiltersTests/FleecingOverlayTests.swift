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

    /// Puts a snapshot on `disk`, with `temp` as its target.
    private static func freeze(_ setup: SimulatedGraph) async throws(BlockError) {
        try await setup.open([
            "driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp",
        ])
        try await setup.open(["driver": "snapshot-access", "node-name": "snap", "file": "cbw"])
    }

    /// A target above the disk itself shows the disk's zeroes as long as they are there.
    @Test func zeroesThatTheTargetShowsOfTheDiskAreCopied() async throws {
        let simulation = Simulation(seed: 1)
        for path in ["/disk", "/temp"] { simulation.disk.addFile(path, size: 0) }
        let seen = try await SimulatedGraph.with(simulation) {
            setup throws(BlockError) -> [Set<UInt8>] in
            func image(_ path: String) -> JSONValue {
                ["driver": "file", "filename": .string(path)]
            }
            for path in ["/disk", "/temp"] {
                try await setup.createQCOW2(path, size: 1 << 20)
            }
            try await setup.open(
                ["driver": "qcow2", "node-name": "disk", "file": image("/disk")])
            try await setup.open([
                "driver": "qcow2", "node-name": "temp", "file": image("/temp"), "backing": "disk",
            ])
            try await Self.freeze(setup)
            let guest = try setup.use("cbw")
            try await setup.write(guest, 70_000, 1000, 7)
            return [
                try await setup.read(guest, 70_000, 1000),
                try await setup.read(try setup.use("snap", .consistentRead), 70_000, 1000),
            ]
        }
        #expect(seen == [[7], [0]])
    }

    /// A raw disk inside an image shows the data of that image's backing image as its own.
    @Test func aLongChangeKeepsDataThatIsBelowARawDisk() async throws {
        let size = 4 << 20
        let simulation = Simulation(seed: 1)
        simulation.disk.addFile("/base", bytes: [UInt8](repeating: 0xaa, count: size))
        for path in ["/disk", "/temp"] { simulation.disk.addFile(path, size: 0) }
        let (flags, seen) = try await SimulatedGraph.with(simulation) {
            setup throws(BlockError) -> (ExtentFlags, Set<UInt8>) in
            try await setup.createQCOW2("/disk", size: size)
            try await setup.createQCOW2("/temp", size: size)
            func image(_ path: String) -> JSONValue {
                ["driver": "file", "filename": .string(path)]
            }
            try await setup.open([
                "driver": "raw", "node-name": "disk",
                "file": [
                    "driver": "qcow2", "file": image("/disk"),
                    "backing": ["driver": "raw", "read-only": true, "file": image("/base")],
                ],
            ])
            try await setup.open(
                ["driver": "qcow2", "node-name": "temp", "file": image("/temp")])
            try await Self.freeze(setup)
            let guest = try setup.use("cbw")
            let flags = try await guest.chainStatus(ByteRange(0, size)).flags
            try await guest.writeZeroes(ByteRange(0, size))
            let snapshot = try setup.use("snap", .consistentRead)
            return (flags, try await setup.read(snapshot, 0, size))
        }
        #expect(flags.contains(.data) && !flags.contains(.zero))
        #expect(seen == [0xaa])
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
