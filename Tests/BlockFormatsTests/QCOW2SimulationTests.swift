import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

/// qcow2 on a disk that loses power and fails, against a model of what may be read.
@Suite struct QCOW2SimulationTests {
    static let size = 1 << 20

    /// The model goes from boot to boot, one thread at a time.
    final class Model: @unchecked Sendable {
        let shadow = ShadowDisk(size: size)
    }
    static let registry = DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers)

    static func create(
        _ simulation: Simulation, clusterSize: Int, isLazy: Bool, size: Int = size,
        version: String = "v3", more: JSONObject = [:], path: String = "/disk"
    ) async throws {
        simulation.disk.addFile(path, size: 0)
        try await simulation.run { thread throws(BlockError) in
            let graph = BlockGraph(on: thread, registry: registry)
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

    /// Opens the image, runs `body` on it and closes it; closing may fail.
    static func use(
        _ thread: IOThread, _ body: (Edge) async throws(BlockError) -> [String]
    ) async throws(BlockError) -> [String] {
        let graph = BlockGraph(on: thread, registry: registry)
        let node = try await graph.open(
            [
                "driver": "qcow2", "node-name": "image", "discard": "unmap",
                "l2-cache-size": 1024, "l2-cache-entry-size": 512, "cache-clean-interval": 0,
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], monitorOwned: true)
        let edge = try graph.attach(
            NamedUser("test"), to: node, Access(uses: [.consistentRead, .write], shares: .all))
        let result = try await body(edge)
        try? await graph.detach(edge)
        try? await graph.closeAll()
        return result
    }

    /// What `qemu-img check` says of the image on the simulated disk: leaks may be.
    static func check(_ simulation: Simulation) throws {
        let folder = try QCOW2TestFolder()
        try folder.write(simulation.disk.bytes(of: "/disk") ?? [], "a.qcow2")
        if (try? folder.run(["qemu-img", "check", "-f", "qcow2", "a.qcow2"], status: 3)) == nil {
            try folder.check("a.qcow2")
        }
    }

    @Test(arguments: [(512, false), (4096, false), (4096, true), (65536, false)])
    func afterPowerLossTheImageLeaksAtWorst(clusterSize: Int, isLazy: Bool) async throws {
        for seed in 1...10 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await Self.create(simulation, clusterSize: clusterSize, isLazy: isLazy)
            let model = Model()
            simulation.options.crashNanoseconds = 3_000_000 + seed * 17_000_000
            var options = RandomRequests.Options()
            options.count = 400
            let requests = options
            let outcome = try await simulation.boot { thread throws(BlockError) in
                try await Self.use(thread) { edge throws(BlockError) in
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
            if !isLazy { try Self.check(simulation) }
            simulation.options.crashNanoseconds = nil
            let violations = try await simulation.run { thread throws(BlockError) in
                try await Self.use(thread) { edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.verify()
                    return run.violations
                }
            }
            #expect(violations == [], "seed \(seed), clusters of \(clusterSize), lazy \(isLazy)")
            try Self.check(simulation)
        }
    }

    @Test func withSubclustersAnImageLeaksAtWorst() async throws {
        for seed in 1...10 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await Self.create(
                simulation, clusterSize: 16384, isLazy: false, more: ["extended-l2": true])
            let model = Model()
            simulation.options.crashNanoseconds = 3_000_000 + seed * 17_000_000
            var options = RandomRequests.Options()
            options.count = 400
            let requests = options
            let outcome = try await simulation.boot { thread throws(BlockError) in
                try await Self.use(thread) { edge throws(BlockError) in
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
            try Self.check(simulation)
            simulation.options.crashNanoseconds = nil
            let violations = try await simulation.run { thread throws(BlockError) in
                try await Self.use(thread) { edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.verify()
                    return run.violations
                }
            }
            #expect(violations == [], "seed \(seed)")
            try Self.check(simulation)
        }
    }

    @Test(arguments: [512, 65536]) func failingWritesLeakAtWorst(clusterSize: Int) async throws {
        for seed in 1...10 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await Self.create(simulation, clusterSize: clusterSize, isLazy: false)
            simulation.faults = [
                FaultRule(.write, .fail(5), skip: Int(seed) * 7, times: 20, perMille: 100)
            ]
            let model = Model()
            var options = RandomRequests.Options()
            options.mayFailWith = [.inputOutput]
            let requests = options
            let violations = try await simulation.run { thread throws(BlockError) in
                try await Self.use(thread) { edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.run()
                    return run.violations
                }
            }
            #expect(violations == [], "seed \(seed)")
            try Self.check(simulation)
        }
    }
}
