import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// `preallocate` between a user and a file.
@Suite struct PreallocateTests {
    private static func withFile<T: Sendable>(
        _ options: JSONValue, _ simulation: Simulation,
        _ body: @escaping @Sendable (SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        simulation.disk.addFile("/disk", size: 100_000)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            var object: JSONObject = [
                "driver": "preallocate", "node-name": "top", "prealloc-align": 65536,
                "prealloc-size": 1_000_000, "file": ["driver": "file", "filename": "/disk"],
            ]
            if case .object(let more) = options {
                for (key, value) in more.members { object[key] = value }
            }
            try await setup.open(.object(object))
            return try await body(
                setup, try setup.use("top", [.consistentRead, .write, .resize]))
        }
    }

    @Test func aFileThatGrowsGetsMoreAndGivesItBack() async throws {
        let simulation = Simulation(seed: 1)
        let sizes = try await Self.withFile([:], simulation) { setup, edge throws(BlockError) in
            try await edge.resize(to: 200_000)
            try await setup.write(edge, 199_000, 1000, 7)
            let inner = edge.node.child(named: "file")?.size ?? 0
            try await edge.resize(to: 300_000)
            #expect(try await setup.read(edge, 200_000, 100_000) == [0])
            return [edge.size, inner, edge.node.child(named: "file")?.size ?? 0]
        }
        // 200 000 and a million, up to the next 64 KiB; and the same file again.
        #expect(sizes == [300_000, 1_245_184, 1_245_184])
        #expect(simulation.disk.bytes(of: "/disk")?.count == 300_000)
    }

    @Test func theReserveGoesWithTheLastWriter() async throws {
        let simulation = Simulation(seed: 2)
        let size = try await Self.withFile([:], simulation) { setup, edge throws(BlockError) in
            try await edge.resize(to: 200_000)
            let file = edge.node.child(named: "file")
            try await setup.leave(edge)
            await setup.thread.sleep(nanoseconds: 1_000_000_000)
            return file?.size
        }
        #expect(size == 200_000)
    }

    @Test func aShrunkFileGrowsWithZeroes() async throws {
        let values = try await Self.withFile([:], Simulation(seed: 3)) {
            setup, edge throws(BlockError) in
            try await edge.resize(to: 200_000)
            try await setup.write(edge, 0, 200_000, 7)
            try await edge.resize(to: 150_000)
            try await edge.resize(to: 250_000)
            return try await setup.read(edge, 150_000, 100_000)
        }
        #expect(values == [0])
    }

    @Test func anImageAboveItStaysSound() async throws {
        let simulation = Simulation(seed: 4)
        simulation.disk.addFile("/image", size: 0)
        let violations = try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            try await setup.createQCOW2("/image", size: 1 << 20, clusterSize: 4096)
            try await setup.open(
                [
                    "driver": "qcow2", "node-name": "image", "discard": "unmap",
                    "file": [
                        "driver": "preallocate", "prealloc-align": 512, "prealloc-size": 100_000,
                        "file": ["driver": "file", "filename": "/image"],
                    ],
                ])
            let edge = try setup.use("image")
            return await DriverConformance.checkRandom(edge, seed: 4, requests: 400)
        }
        #expect(violations == [])
    }

    @Test(
        arguments: [
            ["prealloc-align": 0], ["prealloc-align": 100], ["prealloc-size": "x"],
        ] as [JSONValue])
    func badOptionsAreRefused(options: JSONValue) async throws {
        await #expect(throws: BlockError.self) {
            try await Self.withFile(options, Simulation(seed: 1)) { _, _ throws(BlockError) in }
        }
    }
}
