import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// `blkverify` and `blklogwrites` on simulated files.
@Suite struct BlockVerifyTests {
    private static func withPair<T: Sendable>(
        _ simulation: Simulation,
        _ body: @escaping @Sendable (SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        simulation.disk.addFile("/raw", size: 1 << 20)
        simulation.disk.addFile("/image", size: 0)
        return try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            try await setup.createQCOW2("/image", size: 1 << 20)
            try await setup.open(["driver": "file", "node-name": "raw", "filename": "/raw"])
            try await setup.open(
                [
                    "driver": "blkverify", "node-name": "top", "raw": "raw",
                    "test": [
                        "driver": "qcow2", "file": ["driver": "file", "filename": "/image"],
                    ],
                ])
            return try await body(setup, try setup.use("top"))
        }
    }

    @Test(arguments: 1...3) func imagesThatAgreeReadAsOne(seed: Int) async throws {
        let violations = try await Self.withPair(Simulation(seed: UInt64(seed))) {
            _, edge throws(BlockError) in
            await DriverConformance.check(edge, seed: UInt64(seed), requests: 200)
        }
        #expect(violations == [], "seed \(seed)")
    }

    @Test func aDifferenceIsFoundAndPlaced() async throws {
        let error = try await Self.withPair(Simulation(seed: 1)) {
            setup, edge throws(BlockError) -> BlockError? in
            let raw = try setup.use("raw")
            try await setup.write(raw, 70_001, 1, 9)
            _ = try await setup.read(edge, 0, 70_001)
            do throws(BlockError) {
                _ = try await setup.read(edge, 65_536, 65_536)
                return nil
            } catch {
                return error
            }
        }
        #expect(error?.code == .corrupt)
        #expect(error?.message.contains("byte 70001 is 0") == true)
    }

    @Test func aRawImageThatIsTooSmallIsRefused() async throws {
        await #expect(throws: BlockError.self) {
            try await SimulatedGraph.with { setup throws(BlockError) in
                try await setup.open(
                    [
                        "driver": "blkverify", "node-name": "top",
                        "raw": ["driver": "null-co", "size": 512],
                        "test": ["driver": "null-co", "size": 1024],
                    ])
            }
        }
    }
}

@Suite struct BlockLogWritesTests {
    private static let size = 1 << 20

    private static func logged<T: Sendable>(
        _ simulation: Simulation, _ options: JSONValue = [:],
        _ body: @escaping @Sendable (SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            var object: JSONObject = [
                "driver": "blklogwrites", "node-name": "top", "discard": "unmap",
                "file": ["driver": "file", "filename": "/disk"],
                "log": ["driver": "file", "node-name": "log", "filename": "/log"],
            ]
            if case .object(let more) = options {
                for (key, value) in more.members { object[key] = value }
            }
            try await setup.open(.object(object))
            return try await body(setup, try setup.use("top"))
        }
    }

    private static func simulation(_ seed: Int) -> Simulation {
        let simulation = Simulation(seed: UInt64(seed))
        simulation.disk.addFile("/disk", size: size)
        simulation.disk.addFile("/log", size: 0)
        return simulation
    }

    /// What the log says was done, replayed on zeroes as `dm-log-writes` tools do it.
    private static func replayed(_ log: [UInt8]) -> [UInt8] {
        func word(_ offset: Int) -> Int {
            (0..<8).reduce(0) { $0 | Int(log[offset + $1]) << ($1 * 8) }
        }
        var disk = [UInt8](repeating: 0, count: size)
        let sectorSize = word(24)
        var offset = sectorSize
        for _ in 0..<word(16) {
            let (sector, count, flags) = (word(offset), word(offset + 8), word(offset + 16))
            offset += sectorSize
            guard flags & 4 == 0 else { continue }
            let bytes = count * sectorSize
            for index in 0..<bytes where sector * sectorSize + index < size {
                disk[sector * sectorSize + index] = log[offset + index]
            }
            offset += bytes
        }
        return disk
    }

    @Test(arguments: [(1, 512), (2, 512), (3, 4096)])
    func theLogReplaysToTheDisk(seed: Int, sectorSize: Int) async throws {
        let simulation = Self.simulation(seed)
        let violations = try await Self.logged(
            simulation, ["log-sector-size": .integer(sectorSize), "discard": "ignore"]
        ) { _, edge throws(BlockError) in
            var options = RandomRequests.Options()
            options.count = 300
            options.depth = 1
            let run = RandomRequests(
                edge, ShadowDisk(size: Self.size), seed: UInt64(seed), options)
            await run.run()
            try await edge.flush()
            return run.violations
        }
        #expect(violations == [])
        let log = try #require(simulation.disk.bytes(of: "/log"))
        #expect(Self.replayed(log) == simulation.disk.bytes(of: "/disk"), "seed \(seed)")
    }

    @Test func aLogIsAppendedTo() async throws {
        let simulation = Self.simulation(1)
        for value in [1, 2] as [UInt8] {
            try await Self.logged(simulation, ["log-append": .bool(value == 2)]) {
                setup, edge throws(BlockError) in
                try await setup.write(edge, Int(value) * 4096, 4096, value)
                try await edge.discard(ByteRange(65_536, 4096))
                try await edge.flush()
            }
        }
        let log = try #require(simulation.disk.bytes(of: "/log"))
        #expect(Self.replayed(log) == simulation.disk.bytes(of: "/disk"))
        #expect(log[16] == 6)
    }

    @Test func theSuperBlockFollowsTheInterval() async throws {
        let simulation = Self.simulation(1)
        try await Self.logged(simulation, ["log-super-update-interval": 2]) {
            setup, edge throws(BlockError) in
            for index in 0..<5 { try await setup.write(edge, index * 512, 512, 1) }
            let log = try setup.use("log", .consistentRead)
            #expect(try await setup.read(log, 16, 1) == [4])
            try await setup.leave(log)
        }
        #expect(simulation.disk.bytes(of: "/log")?[16] == 5)
    }

    @Test(
        arguments: [
            ["log-sector-size": 100], ["log-sector-size": 16_777_216], ["log-append": true],
            ["log-super-update-interval": 0],
        ] as [JSONValue])
    func badOptionsAndLogsAreRefused(options: JSONValue) async throws {
        await #expect(throws: BlockError.self) {
            try await Self.logged(Self.simulation(1), options) { _, _ throws(BlockError) in }
        }
    }

    @Test func aDamagedLogIsNotAppendedTo() async throws {
        let good = Self.simulation(1)
        try await Self.logged(good) { setup, edge throws(BlockError) in
            try await setup.write(edge, 0, 512, 1)
            try await edge.flush()
        }
        let log = try #require(good.disk.bytes(of: "/log"))
        // The version; the sector size; how many entries; an entry's flags and its length.
        for place in [8, 24, 23, 16, 512 + 17, 512 + 15] {
            var bytes = log
            bytes[place] = 0x7f
            let simulation = Simulation(seed: 1)
            simulation.disk.addFile("/disk", size: Self.size)
            simulation.disk.addFile("/log", bytes: bytes)
            await #expect(throws: BlockError.self, "byte \(place)") {
                try await Self.logged(simulation, ["log-append": true]) { _, _ throws(BlockError) in
                }
            }
        }
    }
}
