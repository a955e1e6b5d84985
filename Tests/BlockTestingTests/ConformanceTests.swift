import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

#if canImport(Glibc)
import Glibc
#endif

let registry = DriverRegistry(
    BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)

/// Node options by name, on files `/disk` and `/temp` of 300 KB.
private let graphs: [String: JSONValue] = [
    "file": ["driver": "file", "filename": "/disk", "discard": "unmap"],
    "file, direct": [
        "driver": "file", "filename": "/disk", "discard": "unmap", "cache": ["direct": true],
    ],
    "raw": [
        "driver": "raw", "discard": "unmap", "file": ["driver": "file", "filename": "/disk"],
    ],
    "raw, offset and size": [
        "driver": "raw", "discard": "unmap", "offset": 4096, "size": 270_336,
        "file": ["driver": "file", "filename": "/disk"],
    ],
    "raw, detect-zeroes": [
        "driver": "raw", "discard": "unmap", "detect-zeroes": "unmap",
        "file": ["driver": "file", "filename": "/disk"],
    ],
    "copy-before-write": [
        "driver": "copy-before-write", "discard": "unmap",
        "file": ["driver": "file", "filename": "/disk"],
        "target": ["driver": "file", "filename": "/temp"],
    ],
]

@Suite struct ConformanceTests {
    @Test(arguments: graphs.keys.sorted())
    func driversKeepTheirPromises(name: String) async throws {
        let options = try #require(graphs[name])
        for seed in 1...4 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            simulation.disk.addFile("/disk", size: 300_032)
            simulation.disk.addFile("/temp", size: 300_032)
            let violations = try await simulation.run { thread throws(BlockError) in
                try await check(thread, options, seed)
            }
            #expect(violations == [], "\(name), seed \(seed)")
        }
    }

    /// The same on a real engine and file system.
    @Test(arguments: ["uring", "threads"]) func onTheHost(engine: String) async throws {
        let choice: EngineChoice = engine == "threads" ? .threads : .automatic
        let thread = try IOThread(name: "conformance") { () throws(BlockError) in
            try choice.makeEngine()
        }
        defer { thread.stop() }
        let path = "/tmp/merino-conformance-\(getpid())-\(UInt64.random(in: 0 ... .max))"
        defer { unlink(path) }
        let violations = try await thread.run { () async throws(BlockError) in
            let file = try await File.open(
                path, FileOptions(writable: true, create: true), on: thread)
            try await file.setSize(300_032)
            await file.close()
            return try await check(
                thread, ["driver": "file", "filename": .string(path), "discard": "unmap"], 1)
        }
        #expect(violations == [])
    }
}

private func check(
    _ thread: IOThread, _ options: JSONValue, _ seed: UInt64
) async throws(BlockError) -> [String] {
    let graph = BlockGraph(on: thread, registry: registry)
    let node = try await graph.open(options)
    let edge = try graph.attach(
        NamedUser("test"), to: node,
        Access(uses: [.consistentRead, .write], shares: .all))
    node.release("opening")
    let violations = await DriverConformance.check(edge, seed: seed)
    try await graph.detach(edge)
    return violations + (graph.nodes.isEmpty ? [] : ["nodes stay open"])
}
