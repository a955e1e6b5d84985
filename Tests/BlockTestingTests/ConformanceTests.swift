import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

let registry = DriverRegistry(
    BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)

/// Node options by name, on files `/disk` and `/temp` of 300 KB; `/image` is a qcow2 image that is
/// made with the options of ``creations`` first.
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
    "qcow2": qcow2(),
    "qcow2, clusters of 512": qcow2(["l2-cache-size": 1024, "l2-cache-entry-size": 512]),
    "qcow2, version 2": qcow2(),
    "qcow2, lazy refcounts": qcow2(["discard-no-unref": true]),
    "qcow2, over a raw image": qcow2(["backing": ["driver": "file", "filename": "/disk"]]),
    "qcow2, version 2 over a raw image": qcow2([
        "backing": ["driver": "file", "filename": "/disk"]
    ]),
    "qcow2, preallocated, detect-zeroes": qcow2(["detect-zeroes": "unmap"]),
    "qcow2, subclusters": qcow2(),
    "qcow2, subclusters over a raw image": qcow2([
        "backing": ["driver": "file", "filename": "/disk"]
    ]),
    "qcow2, with a snapshot": qcow2(),
    "throttle": [
        "driver": "throttle", "discard": "unmap", "throttle-group": "group",
        "file": ["driver": "file", "filename": "/disk"],
    ],
    "copy-on-read": [
        "driver": "copy-on-read", "discard": "unmap",
        "file": qcow2(["backing": ["driver": "file", "filename": "/disk"]]),
    ],
    "compress": ["driver": "compress", "discard": "unmap", "file": qcow2()],
    "preallocate": [
        "driver": "preallocate", "discard": "unmap",
        "file": ["driver": "file", "filename": "/disk"],
    ],
]

private func qcow2(_ more: JSONValue = [:]) -> JSONValue {
    var options: JSONObject = [
        "driver": "qcow2", "discard": "unmap", "cache-clean-interval": 0,
        "file": ["driver": "file", "filename": "/image"],
    ]
    if case .object(let more) = more {
        for (key, value) in more.members { options[key] = value }
    }
    return .object(options)
}

/// How `/image` is made.
private let creations: [String: JSONValue] = [
    "qcow2": [:], "qcow2, clusters of 512": ["cluster-size": 512],
    "qcow2, version 2": ["version": "v2"], "qcow2, lazy refcounts": ["lazy-refcounts": true],
    "qcow2, over a raw image": ["cluster-size": 4096],
    "qcow2, version 2 over a raw image": ["version": "v2", "cluster-size": 4096],
    "qcow2, preallocated, detect-zeroes": ["preallocation": "metadata"],
    "qcow2, subclusters": ["extended-l2": true],
    "qcow2, subclusters over a raw image": ["extended-l2": true, "cluster-size": 16384],
    "qcow2, with a snapshot": ["cluster-size": 16384], "copy-on-read": ["cluster-size": 4096],
    "compress": ["cluster-size": 4096],
]

private func create(_ thread: IOThread, _ given: JSONValue) async throws(BlockError) {
    let graph = BlockGraph(on: thread, registry: registry)
    guard case .object(var options) = given else { return }
    options["size"] = 300_032
    options["file"] = ["driver": "file", "filename": "/image"]
    let creation = ImageCreation(graph, options: try OptionReader(.object(options), of: "creation"))
    try await registry.driver(named: "qcow2").create?(creation)
    try await creation.finish()
}

@Suite struct ConformanceTests {
    @Test(arguments: graphs.keys.sorted())
    func driversKeepTheirPromises(name: String) async throws {
        let options = try #require(graphs[name])
        for seed in 1...4 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            simulation.disk.addFile("/disk", size: 300_032)
            simulation.disk.addFile("/temp", size: 300_032)
            simulation.disk.addFile("/image", size: 0)
            let violations = try await simulation.run { thread throws(BlockError) in
                if let creation = creations[name] { try await create(thread, creation) }
                return try await check(
                    thread, options, seed, hasSnapshot: name.hasSuffix("with a snapshot"))
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
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let violations = try await thread.run { () async throws(BlockError) in
            try await folder.makeFile("disk", size: 300_032, on: thread)
            return try await check(
                thread,
                ["driver": "file", "filename": .string(folder["disk"]), "discard": "unmap"], 1)
        }
        #expect(violations == [])
    }
}

private func check(
    _ thread: IOThread, _ options: JSONValue, _ seed: UInt64, hasSnapshot: Bool = false
) async throws(BlockError) -> [String] {
    let graph = BlockGraph(on: thread, registry: registry)
    try addGroup(to: graph)
    let node = try await graph.open(options)
    let edge = try graph.attach(
        NamedUser("test"), to: node,
        Access(uses: [.consistentRead, .write], shares: .all))
    node.release("opening")
    if hasSnapshot {
        let data = try IOVector(allocating: edge.size)
        data.fill(1)
        try await edge.write(0, from: data)
        _ = try await graph.createSnapshot("s", of: node, at: .init(seconds: 1, nanoseconds: 1))
    }
    let violations = await DriverConformance.check(edge, seed: seed)
    try await graph.detach(edge)
    return violations + (graph.nodes.isEmpty ? [] : ["nodes stay open"])
}

/// Slow enough that requests wait for each other.
private func addGroup(to graph: BlockGraph) throws(BlockError) {
    var limits = ThrottleLimits()
    limits[.bytesTotal].average = 1 << 20
    let group = try ThrottleGroup("group", limits, on: graph.thread)
    try graph.addObject(group, as: group.identifier)
}
