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

/// The fleecing graph on a simulated machine, under load, held to its promise: every read of the
/// snapshot returns the state at the moment it was taken, or is refused.
private final class FleecingModel: @unchecked Sendable {
    static let size = 700 << 10
    static let cluster = 64 << 10

    let graph: BlockGraph
    let guest: Edge
    let snapshot: Edge
    let frozen: [UInt8]
    private var random: SeededRandom
    /// Clusters that a discard of the snapshot began to drop.
    private var dropped: Set<Int> = []
    private(set) var violations: [String] = []
    /// Reads of the snapshot that succeeded, and how the others failed.
    private(set) var readCount = 0
    private(set) var failureCounts: [BlockError.Code: Int] = [:]
    /// A read was refused because the snapshot is broken.
    private(set) var isBroken = false
    let discards: Bool
    private var running = 0

    /// The disk: some of it data, some zeroes, some holes.
    static func prepare(_ simulation: Simulation) {
        var random = SeededRandom(seed: simulation.seed ^ 0xd15c)
        var bytes = [UInt8](repeating: 0, count: size)
        var offset = 0
        while offset < size {
            let count = min(1 + random.below(90_000), size - offset)
            let value = random.chance(600) ? UInt8(1 + random.below(255)) : 0
            bytes.withUnsafeMutableBytes {
                _ = UnsafeMutableRawBufferPointer(rebasing: $0[offset..<(offset + count)])
                    .initializeMemory(as: UInt8.self, repeating: value)
            }
            offset += count
        }
        simulation.disk.addFile("/disk", bytes: bytes)
        simulation.disk.addFile("/temp", size: size)
    }

    init(
        _ thread: IOThread, _ simulation: Simulation, _ options: JSONValue, discards: Bool = true
    ) async throws(BlockError) {
        frozen = simulation.disk.bytes(of: "/disk") ?? []
        random = SeededRandom(seed: simulation.seed ^ 0xf1ee)
        self.discards = discards
        graph = BlockGraph(
            on: thread,
            registry: DriverRegistry(
                BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers))
        let ends = try await FleecingEnds(in: graph, folder: "", options: options)
        (guest, snapshot) = (ends.guest, ends.snapshot)
    }

    /// Guest requests and a reader of the snapshot, at the same time.
    ///
    /// - Returns: what was wrong.
    func run(requests: Int, mayFailWith: Set<BlockError.Code> = []) async -> RandomRequests {
        var options = RandomRequests.Options()
        options.count = requests
        options.mayFailWith = mayFailWith
        let load = RandomRequests(guest, ShadowDisk(bytes: frozen), seed: random.next(), options)
        let thread = graph.thread
        for _ in 0..<4 {
            running += 1
            thread.spawn {
                for _ in 0..<(requests / 4) { await self.step() }
                self.running -= 1
            }
        }
        await load.run()
        while running > 0 { await thread.sleep(nanoseconds: 1_000_000) }
        await load.verify()
        await readEverything()
        violations += load.violations.map { "guest: \($0)" }
        return load
    }

    private func step() async {
        let offset = random.below(Self.size)
        let count = min(1 + random.below(random.chance(500) ? 200_000 : 5000), Self.size - offset)
        let range = ByteRange(offset, count)
        switch random.below(discards ? 20 : 18) {
        case 0, 1: await status(range)
        case 18, 19: await discard(range)
        default: await read(range)
        }
    }

    func readEverything() async {
        for offset in stride(from: 0, to: Self.size, by: 32 << 10) {
            await read(ByteRange(offset, min(32 << 10, Self.size - offset)))
        }
    }

    private func touchesDropped(_ range: ByteRange) -> Bool {
        (range.offset / Self.cluster...(range.end - 1) / Self.cluster).contains {
            dropped.contains($0)
        }
    }

    private func failed(_ name: String, _ range: ByteRange, _ error: BlockError) {
        failureCounts[error.code, default: 0] += 1
        guard error.code == .permissionDenied else { return }
        if error.message.contains("broken") {
            isBroken = true
        } else if !touchesDropped(range) {
            violations.append("\(name) of \(range), of which nothing was dropped: \(error)")
        }
    }

    private func read(_ range: ByteRange) async {
        let wasBroken = isBroken
        do throws(BlockError) {
            let data = try IOVector(allocating: range.count)
            data.fill(0xa5)
            if !random.chance(500) || !snapshot.readNow(range.offset, into: data) {
                try await snapshot.read(range.offset, into: data)
            }
            readCount += 1
            if wasBroken { violations.append("a broken snapshot was read at \(range)") }
            let found = data.array
            guard !isFrozenState(found, at: range.offset) else { return }
            let index = found.indices.first { found[$0] != frozen[range.offset + $0] } ?? 0
            violations.append(
                "snapshot byte \(range.offset + index) is \(found[index]), was "
                    + "\(frozen[range.offset + index]) (read of \(range), "
                    + "dropped: \(touchesDropped(range)))")
        } catch {
            failed("a read", range, error)
        }
    }

    private func isFrozenState(_ bytes: [UInt8], at offset: Int) -> Bool {
        frozen.withUnsafeBytes { frozen in
            bytes.withUnsafeBytes { bytes in
                guard let left = frozen.baseAddress, let right = bytes.baseAddress else {
                    return bytes.isEmpty
                }
                return memcmp(left + offset, right, bytes.count) == 0
            }
        }
    }

    private func status(_ range: ByteRange) async {
        do throws(BlockError) {
            let status = try await snapshot.blockStatus(range)
            guard status.count > 0, status.count <= range.count else {
                violations.append("status of \(range) is about \(status.count) bytes")
                return
            }
            let answered = ByteRange(range.offset, status.count)
            guard status.flags.contains(.zero), !touchesDropped(answered) else { return }
            if !isFrozenState([UInt8](repeating: 0, count: answered.count), at: answered.offset) {
                violations.append("status calls \(answered) zero, it was not")
            }
        } catch {
            failed("status", range, error)
        }
    }

    private func discard(_ range: ByteRange) async {
        let first = (range.offset + Self.cluster - 1) / Self.cluster
        let end =
            range.end == Self.size
            ? (Self.size + Self.cluster - 1) / Self.cluster : range.end / Self.cluster
        for cluster in first..<max(first, end) { dropped.insert(cluster) }
        do throws(BlockError) {
            try await snapshot.discard(range)
        } catch {
            failed("a discard", range, error)
        }
    }

    func close() async throws(BlockError) {
        try await graph.detach(snapshot)
        try await graph.detach(guest)
        try await graph.closeAll()
    }
}

private struct ModelResult: Sendable {
    var violations: [String]
    var readCount: Int
    var readFailures: [BlockError.Code: Int]
    var guestFailures: [BlockError.Code: Int]
    var isBroken: Bool
}

private func fleece(
    _ simulation: Simulation, _ options: JSONValue = [:], discards: Bool = true,
    requests: Int = 160, mayFailWith: Set<BlockError.Code> = []
) async throws -> ModelResult {
    FleecingModel.prepare(simulation)
    return try await simulation.run { thread throws(BlockError) in
        let model = try await FleecingModel(thread, simulation, options, discards: discards)
        let load = await model.run(requests: requests, mayFailWith: mayFailWith)
        simulation.faults = []
        simulation.releaseHung()
        do throws(BlockError) {
            try await model.close()
        } catch {
            if !mayFailWith.contains(error.code) { throw error }
        }
        return ModelResult(
            violations: model.violations, readCount: model.readCount,
            readFailures: model.failureCounts, guestFailures: load.failureCounts,
            isBroken: model.isBroken)
    }
}

/// More seeds on demand: `MERINO_SIMULATION_SEEDS=1000`.
private let seeds: ClosedRange<UInt64> = {
    let text = getenv("MERINO_SIMULATION_SEEDS").map { String(cString: $0) }
    return 1...(text.flatMap { UInt64($0) } ?? 8)
}()

@Suite struct FleecingModelTests {
    @Test(arguments: seeds) func everySnapshotReadReturnsTheFrozenState(seed: UInt64) async throws {
        let result = try await fleece(Simulation(seed: seed))
        #expect(result.violations == [], "seed \(seed)")
        #expect(result.readCount > 20, "seed \(seed)")
        #expect(result.guestFailures == [:], "seed \(seed)")
    }

    @Test(arguments: seeds)
    func withBreakGuestWriteOnlyTheGuestSuffersFromATargetThatFails(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.faults = [
            FaultRule(.write, path: "/temp", .fail(EIO), perMille: 300),
            FaultRule(.allocate, path: "/temp", .fail(ENOSPC), perMille: 300),
        ]
        let result = try await fleece(
            simulation, ["on-cbw-error": "break-guest-write"], discards: false,
            mayFailWith: [.inputOutput, .noSpace])
        #expect(result.violations == [], "seed \(seed)")
        #expect(!result.guestFailures.isEmpty, "seed \(seed)")
        #expect(result.readFailures == [:], "seed \(seed)")
    }

    @Test(arguments: seeds)
    func withBreakSnapshotOnlyTheSnapshotSuffersFromATargetThatFails(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.faults = [FaultRule(.write, path: "/temp", .fail(EIO), skip: 4, times: 1)]
        let result = try await fleece(
            simulation, ["on-cbw-error": "break-snapshot"], discards: false)
        #expect(result.violations == [], "seed \(seed)")
        #expect(result.guestFailures == [:], "seed \(seed)")
        #expect(result.isBroken, "seed \(seed)")
    }

    @Test(arguments: seeds)
    func aTargetThatHangsHoldsTheGuestUpForTheTimeoutOnly(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.faults = [
            FaultRule(.write, path: "/temp", .hang, skip: 3, times: 2)
        ]
        let result = try await fleece(
            simulation, ["on-cbw-error": "break-snapshot", "cbw-timeout": 1], discards: false)
        #expect(result.violations == [], "seed \(seed)")
        #expect(result.guestFailures == [:], "seed \(seed)")
        #expect(result.isBroken, "seed \(seed)")
    }

    @Test(arguments: seeds)
    func aTargetThatIsSlowFailsGuestWritesAndKeepsTheSnapshot(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.faults = [
            FaultRule(.write, path: "/temp", .delay(4_000_000_000), skip: 2, times: 2)
        ]
        let result = try await fleece(
            simulation, ["cbw-timeout": 1], discards: false, mayFailWith: [.timedOut])
        #expect(result.violations == [], "seed \(seed)")
        #expect(result.guestFailures[.timedOut, default: 0] > 0, "seed \(seed)")
        #expect(result.readFailures == [:], "seed \(seed)")
    }

    @Test(arguments: seeds)
    func aTargetThatIsFullFollowsThePolicy(seed: UInt64) async throws {
        for policy in ["break-guest-write", "break-snapshot"] {
            let simulation = Simulation(seed: seed)
            simulation.faults = [
                FaultRule(.write, path: "/temp", .fail(ENOSPC), skip: 5),
                FaultRule(.allocate, path: "/temp", .fail(ENOSPC), skip: 2),
            ]
            let result = try await fleece(
                simulation, ["on-cbw-error": .string(policy)], discards: false,
                mayFailWith: policy == "break-snapshot" ? [] : [.noSpace])
            #expect(result.violations == [], "seed \(seed), \(policy)")
            #expect(result.isBroken == (policy == "break-snapshot"), "seed \(seed), \(policy)")
            #expect(result.guestFailures.isEmpty == (policy == "break-snapshot"), "seed \(seed)")
        }
    }

    @Test(arguments: seeds)
    func aDiskThatFailsNeverMakesTheSnapshotWrong(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.faults = [
            FaultRule(.read, .fail(EIO), skip: 10, perMille: 100),
            FaultRule(.write, .fail(EIO), skip: 10, perMille: 100),
        ]
        let result = try await fleece(
            simulation, mayFailWith: [.inputOutput])
        #expect(result.violations == [], "seed \(seed)")
    }

    @Test func theSameSeedGivesTheSameRun() async throws {
        var hashes: Set<UInt64> = []
        for _ in 0..<3 {
            let simulation = Simulation(seed: 4)
            _ = try await fleece(simulation)
            hashes.insert(simulation.traceHash)
        }
        #expect(hashes.count == 1)
    }
}
