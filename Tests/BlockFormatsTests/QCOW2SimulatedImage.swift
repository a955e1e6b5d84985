import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

/// A qcow2 image on a simulated disk: `/disk`, with its data in `/data` where it has a data file.
enum QCOW2SimulatedImage {
    static let size = 1 << 20
    static let registry = DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers)

    /// The model goes from boot to boot, one thread at a time.
    final class Model: @unchecked Sendable {
        let shadow: ShadowDisk
        init(size: Int = QCOW2SimulatedImage.size) { shadow = ShadowDisk(size: size) }
    }

    // MARK: Making and opening

    static func create(
        _ simulation: Simulation, clusterSize: Int, isLazy: Bool, size: Int = size,
        version: String = "v3", more: JSONObject = [:], path: String = "/disk"
    ) async throws {
        simulation.disk.addFile(path, size: 0)
        if more["data-file"] != nil { simulation.disk.addFile("/data", size: 0) }
        try await simulation.run { thread throws(BlockError) in
            let graph = BlockGraph(on: thread, registry: registry)
            try QCOW2TestFolder.addSecrets(to: graph)
            var options: JSONObject = [
                "size": .integer(size), "cluster-size": .integer(clusterSize),
                "lazy-refcounts": .bool(isLazy), "version": .string(version),
                "file": ["driver": "file", "filename": .string(path), "locking": "off"],
            ]
            for (key, value) in more.members { options[key] = value }
            let creation = ImageCreation(
                graph, options: try OptionReader(.object(options), of: "creation"))
            guard let create = try registry.driver(named: "qcow2").create else { return }
            try await create(creation)
            try await creation.finish()
        }
    }

    /// The options that the image is opened with, and `more`.
    static func options(_ more: JSONObject = [:]) -> JSONValue {
        var options: JSONObject = [
            "driver": "qcow2", "node-name": "image", "discard": "unmap",
            "l2-cache-size": 1024, "l2-cache-entry-size": 512, "cache-clean-interval": 0,
            "file": ["driver": "file", "filename": "/disk", "locking": "off"],
        ]
        for (key, value) in more.members { options[key] = value }
        return .object(options)
    }

    /// - Parameter more: options beside those that every test opens it with.
    static func open(
        _ thread: IOThread, _ more: JSONObject = [:],
        uses: Permission = [.consistentRead, .write]
    ) async throws(BlockError) -> (BlockGraph, Edge) {
        let graph = BlockGraph(on: thread, registry: registry)
        try QCOW2TestFolder.addSecrets(to: graph)
        let node = try await graph.open(options(more), monitorOwned: true)
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: uses, shares: .all))
        return (graph, edge)
    }

    /// Closing may fail.
    static func close(_ graph: BlockGraph, _ edge: Edge) async {
        try? await graph.detach(edge)
        try? await graph.closeAll()
    }

    /// Opens the image, runs `body` on it and closes it.
    static func use(
        _ thread: IOThread, _ more: JSONObject = [:],
        _ body: (Edge) async throws(BlockError) -> [String]
    ) async throws(BlockError) -> [String] {
        let (graph, edge) = try await open(thread, more)
        let result = try await body(edge)
        await close(graph, edge)
        return result
    }

    /// Checks the image with what repairs it.
    static func mend(
        _ thread: IOThread, _ repair: CheckRepair
    ) async throws(BlockError) -> CheckReport {
        let graph = BlockGraph(on: thread, registry: registry)
        var inherited = NodeOptions()
        inherited.isForCheck = true
        let node = try await graph.open(
            [
                "driver": "qcow2", "read-only": .bool(repair.isEmpty),
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], inheriting: inherited)
        let uses: Permission =
            repair.isEmpty ? .consistentRead : [.consistentRead, .write, .resize]
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: uses, shares: .all))
        node.release("opening")
        let report = try await edge.check(repair)
        await close(graph, edge)
        return report
    }

    // MARK: Judging

    /// Passes when `qemu-img check` finds leaks in the image at worst.
    static func check(_ simulation: Simulation) throws {
        let folder = try QCOW2TestFolder()
        let bytes = simulation.disk.bytes(of: "/disk") ?? []
        try folder.write(bytes, "a.qcow2")
        var options: JSONObject = [
            "driver": "qcow2", "backing": .null,
            "file": ["driver": "file", "filename": "a.qcow2"],
        ]
        if let data = simulation.disk.bytes(of: "/data") {
            try folder.write(data, "a.data")
            options["data-file"] = ["driver": "file", "filename": "a.data"]
        }
        // The method of encryption.
        if bytes.count > 36, bytes[35] != 0 { options["encrypt"] = ["key-secret": "good"] }
        let name = "json:" + JSONValue.object(options).text()
        let command = ["qemu-img", "check"] + QCOW2TestFolder.objects + [name]
        if (try? folder.run(command, status: 3)) == nil { try folder.run(command) }
    }

    /// Sends random requests until power is cut, at a time by the seed, and looks at what is left: what was
    /// flushed is there, and the image leaks at worst.
    ///
    /// - Parameters:
    ///   - opening: options beside those that every test opens it with.
    ///   - checksCut: also right after the cut: not where counts are late by design.
    static func checkPowerLoss(
        _ simulation: Simulation, _ opening: JSONObject = [:],
        _ requests: RandomRequests.Options, stepNanoseconds: UInt64 = 17_000_000,
        checksCut: Bool = true
    ) async throws {
        let seed = simulation.seed
        let model = Model()
        simulation.options.crashNanoseconds = 3_000_000 + seed * stepNanoseconds
        let outcome = try await simulation.boot { thread throws(BlockError) in
            try await use(thread, opening) { edge throws(BlockError) in
                let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                await run.run()
                return run.violations
            }
        }
        if case .finished(let violations) = outcome {
            #expect(violations == [], "seed \(seed)")
        } else {
            model.shadow.crash()
        }
        if checksCut { try check(simulation) }
        simulation.options.crashNanoseconds = nil
        let violations = try await simulation.run { thread throws(BlockError) in
            try await use(thread, opening) { edge throws(BlockError) in
                let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                await run.verify()
                return run.violations
            }
        }
        #expect(violations == [], "seed \(seed)")
        try check(simulation)
    }
}
