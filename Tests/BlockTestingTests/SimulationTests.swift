import BlockCore
import BlockIO
import BlockTesting
import Testing

#if canImport(Glibc)
import Glibc
#endif

/// A few files written, read and synchronised by many tasks at once.
@Sendable func churn(_ thread: IOThread, seed: UInt64) async throws(BlockError) -> [UInt8] {
    let file = try await File.open(
        "/disk", FileOptions(writable: true, create: true), on: thread)
    final class Tally: @unchecked Sendable { var running = 0 }
    let tally = Tally()
    var random = SeededRandom(seed: seed)
    for _ in 0..<100 {
        let offset = random.below(100_000)
        let value = UInt8(random.below(256))
        let count = 1 + random.below(20_000)
        let kind = random.below(5)
        tally.running += 1
        thread.spawn {
            defer { tally.running -= 1 }
            guard let data = try? IOVector(allocating: count) else { return }
            data.fill(value)
            switch kind {
            case 0: _ = try? await file.read(data, at: offset)
            case 1: try? await file.synchronize()
            case 2: try? await file.allocate(.punchHole, ByteRange(offset, count))
            default: try? await file.write(data, at: offset)
            }
        }
        while tally.running > 8 { await thread.yield() }
    }
    while tally.running > 0 { await thread.sleep(nanoseconds: 100_000) }
    let all = try IOVector(allocating: 120_000)
    all.fill(0)
    _ = try await file.read(all, at: 0)
    return all.array
}

@Suite struct SimulationTests {
    @Test(arguments: [1, 2, 99] as [UInt64]) func theSameSeedGivesTheSameRun(seed: UInt64)
        async throws
    {
        var runs: [([UInt8], UInt64, Int)] = []
        for _ in 0..<3 {
            let simulation = Simulation(seed: seed)
            let bytes = try await simulation.run { thread throws(BlockError) in
                try await churn(thread, seed: seed)
            }
            runs.append((bytes, simulation.traceHash, simulation.operationCount))
        }
        #expect(runs[0].2 > 50)
        for run in runs { #expect(run == runs[0]) }
    }

    @Test func anotherSeedGivesAnotherRun() async throws {
        var hashes: Set<UInt64> = []
        for seed in 1...4 {
            let simulation = Simulation(seed: UInt64(seed))
            _ = try await simulation.run { thread throws(BlockError) in
                try await churn(thread, seed: 7)
            }
            hashes.insert(simulation.traceHash)
        }
        #expect(hashes.count == 4)
    }

    @Test func timePassesWithoutWaiting() async throws {
        let simulation = Simulation(seed: 1)
        let passed = try await simulation.run { thread throws(BlockError) in
            let start = thread.now
            await thread.sleep(nanoseconds: 3_600_000_000_000)
            return thread.now - start
        }
        #expect(passed >= 3_600_000_000_000)
    }

    @Test func theNthWriteFails() async throws {
        let simulation = Simulation(seed: 5, .calm)
        simulation.disk.addFile("/a", size: 4096)
        simulation.disk.addFile("/b", size: 4096)
        simulation.faults = [FaultRule(.write, path: "/a", .fail(EIO), skip: 2, times: 1)]
        let failed = try await simulation.run { thread throws(BlockError) in
            let data = try IOVector(allocating: 512)
            data.fill(1)
            var failed: [String] = []
            for path in ["/b", "/a"] {
                let file = try await File.open(path, FileOptions(writable: true), on: thread)
                for index in 0..<5 {
                    do throws(BlockError) {
                        try await file.write(data, at: index * 512)
                    } catch {
                        failed.append("\(path) \(index) \(error.code)")
                    }
                }
            }
            return failed
        }
        #expect(failed == ["/a 2 inputOutput"])
    }

    @Test func aFullDiskGivesNoSpace() async throws {
        let simulation = Simulation(seed: 5)
        simulation.disk.addFile("/a", size: 1 << 20)
        simulation.disk.capacityBytes = 64 << 10
        let code = await simulation.failure { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            let data = try IOVector(allocating: 1 << 17)
            data.fill(1)
            try await file.write(data, at: 4096)
        }
        #expect(code == .noSpace)
        #expect(simulation.disk.allocatedBytes(of: "/a") == 64 << 10)
    }

    @Test func aHungOperationEndsWhenItIsReleased() async throws {
        let simulation = Simulation(seed: 5)
        simulation.disk.addFile("/a", size: 4096)
        simulation.faults = [FaultRule(.synchronize, .hang, times: 1)]
        let passed = try await simulation.run { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            let start = thread.now
            thread.spawn {
                await thread.sleep(nanoseconds: 5_000_000_000)
                simulation.releaseHung()
            }
            try await file.synchronize()
            return thread.now - start
        }
        #expect(passed >= 5_000_000_000)
    }

    @Test(arguments: 1...20 as ClosedRange<UInt64>)
    func aCrashKeepsWhatWasSynchronised(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.disk.addFile("/a", size: 1 << 16)
        let outcome = try await simulation.boot { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            let data = try IOVector(allocating: 1 << 14)
            data.fill(1)
            try await file.write(data, at: 0)
            try await file.synchronize()
            data.fill(2)
            try await file.write(data, at: 8192)
            simulation.crash()
            try await file.synchronize()
            return 0
        }
        guard case .crashed = outcome else {
            Issue.record("the machine did not go down")
            return
        }
        let bytes = try #require(simulation.disk.bytes(of: "/a"))
        #expect(bytes[0..<8192].allSatisfy { $0 == 1 }, "seed \(seed)")
        #expect(bytes[8192..<16384].allSatisfy { $0 == 1 || $0 == 2 }, "seed \(seed)")
        #expect(bytes[16384..<24576].allSatisfy { $0 == 0 || $0 == 2 }, "seed \(seed)")
        #expect(bytes[24576...].allSatisfy { $0 == 0 }, "seed \(seed)")
        // The next boot works on what survived.
        let first = try await simulation.run { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: false), on: thread)
            let data = try IOVector(allocating: 1)
            _ = try await file.read(data, at: 0)
            return data.array[0]
        }
        #expect(first == 1)
    }

    @Test func crashesKeepDropAndTear() async throws {
        let simulation = Simulation(seed: 1)
        simulation.disk.addFile("/a", size: 8192)
        _ = try await simulation.run { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            let data = try IOVector(allocating: 8192)
            data.fill(1)
            try await file.write(data, at: 0)
        }
        // One moment, many survivors.
        var kinds: Set<String> = []
        for seed in 1...60 {
            var random = SeededRandom(seed: UInt64(seed))
            let survivor = simulation.disk.survivor(.mixed, using: &random)
            let bytes = Set(survivor.bytes(of: "/a") ?? [])
            kinds.insert(bytes == [1] ? "kept" : bytes == [0] ? "dropped" : "torn")
        }
        #expect(kinds == ["kept", "dropped", "torn"])
    }

    /// A disk writes whole sectors, as the page cache has them at that moment.
    @Test func whatSurvivesOfASectorIsWhatItHeldAtSomeTime() async throws {
        let simulation = Simulation(seed: 4)
        simulation.disk.addFile("/a", size: 512)
        try await simulation.run { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            for value in 1...2 as ClosedRange<UInt8> {
                let vector = try IOVector(allocating: 100)
                vector.fill(value)
                try await file.write(vector, at: Int(value) * 100)
            }
            await file.close()
        }
        var random = SeededRandom(seed: 4)
        var found: Set<[UInt8]> = []
        for _ in 0..<200 {
            let bytes = simulation.disk.survivor(.mixed, using: &random).bytes(of: "/a") ?? []
            found.insert([bytes[100], bytes[200]])
        }
        #expect(found == [[0, 0], [1, 0], [1, 2]])
    }

    @Test func aWriteThatComesShortTearsNoSector() async throws {
        for seed in 1...20 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            simulation.disk.addFile("/a", size: 512)
            simulation.options.shortPerMille = 1000
            // Before it goes on with the rest.
            simulation.faults = [FaultRule(.write, .crash, skip: 1, times: 1)]
            let outcome = try await simulation.boot { thread throws(BlockError) in
                let file = try await File.open("/a", FileOptions(writable: true), on: thread)
                let vector = try IOVector(allocating: 100)
                vector.fill(1)
                try await file.write(vector, at: 0)
            }
            guard case .crashed = outcome else {
                Issue.record("the machine did not go down, seed \(seed)")
                continue
            }
            let bytes = try #require(simulation.disk.bytes(of: "/a"))
            #expect(bytes.allSatisfy { $0 == 0 }, "seed \(seed)")
        }
    }

    @Test func aRunInWhichNothingCanHappenIsReported() async throws {
        let simulation = Simulation(seed: 1)
        simulation.disk.addFile("/a", size: 4096)
        simulation.faults = [FaultRule(.synchronize, .hang)]
        simulation.options.stuckSeconds = 1
        let code = await simulation.failure { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            try await file.synchronize()
        }
        #expect(code == .timedOut)
    }

    @Test(arguments: 1...10 as ClosedRange<UInt64>)
    func socketsDeliverEveryByteInOrder(seed: UInt64) async throws {
        let simulation = Simulation(seed: seed)
        simulation.options.shortPerMille = 300
        let same = try await simulation.run { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: "/socket"), thread: thread)
            let sent = try IOVector(allocating: 300_000)
            var random = SeededRandom(seed: seed)
            for index in 0..<300 { sent.slice(index * 1000, 1000).fill(UInt8(random.below(256))) }
            thread.spawn {
                guard let socket = try? await Socket.connect(to: .unix(path: "/socket"), on: thread)
                else { return }
                try? await socket.send(sent)
                socket.shutdown()
                socket.close()
            }
            guard let peer = try await listener.accept() else { return false }
            let back = try IOVector(allocating: 300_000)
            let whole = try await peer.receiveAll(back)
            let end = try await peer.receive(try IOVector(allocating: 10))
            peer.close()
            listener.close()
            return whole && end == 0 && back.array == sent.array
        }
        #expect(same, "seed \(seed)")
    }

    @Test func connectingToNobodyIsRefused() async {
        let simulation = Simulation(seed: 1)
        let code = await simulation.failure { thread throws(BlockError) in
            _ = try await Socket.connect(to: .ipv4(address: 1, port: 9), on: thread)
        }
        #expect(code == .disconnected)
    }

    @Test func sendingToAClosedPeerFails() async {
        let simulation = Simulation(seed: 1)
        let code = await simulation.failure { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: "/socket"), thread: thread)
            let socket = try await Socket.connect(to: .unix(path: "/socket"), on: thread)
            let peer = try await listener.accept()
            peer?.shutdown()
            peer?.close()
            for _ in 0..<100 { try await socket.send(try IOVector(allocating: 10_000)) }
        }
        #expect(code == .disconnected)
    }

    @Test func locksOfTwoOpenFilesConflict() async throws {
        let simulation = Simulation(seed: 1)
        let granted = try await simulation.run { thread throws(BlockError) in
            let options = FileOptions(writable: true, create: true)
            let first = try await File.open("/a", options, on: thread)
            let second = try await File.open("/a", options, on: thread)
            let range = ByteRange(100, 1)
            return [
                try first.lock(range, .shared), try second.lock(range, .exclusive),
                try second.canLock(range, .shared), try first.lock(range, .none),
                try second.lock(range, .exclusive), try first.canLock(range, .shared),
            ]
        }
        #expect(granted == [true, false, true, true, true, false])
    }

    @Test func holesAreFound() async throws {
        let simulation = Simulation(seed: 1)
        simulation.disk.addFile("/a", size: 1 << 40)
        let extents = try await simulation.run { thread throws(BlockError) in
            let file = try await File.open("/a", FileOptions(writable: true), on: thread)
            let data = try IOVector(allocating: 8192)
            data.fill(1)
            try await file.write(data, at: 1 << 20)
            try await file.allocate(.punchHole, ByteRange(1 << 30, 1 << 39))
            var result: [Int] = []
            var offset = 0
            while let extent = try await file.extent(at: offset) {
                result.append(extent.isData ? extent.end : -extent.end)
                offset = extent.end
            }
            return result
        }
        #expect(extents == [-(1 << 20), (1 << 20) + 8192, -(1 << 40)])
    }
}

extension Simulation {
    /// The code of the error that `body` ends with.
    func failure(
        _ body: @escaping @Sendable (IOThread) async throws(BlockError) -> Void
    ) async -> BlockError.Code? {
        do throws(BlockError) {
            try await run(body)
            return nil
        } catch {
            return error.code
        }
    }
}
