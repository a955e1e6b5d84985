import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockProtocols

#if canImport(Glibc)
import Glibc
#endif

/// The `file` driver on files of its own.
@Suite struct FileDriverTests {
    static func withDisk<T: Sendable>(
        _ body: @escaping @Sendable (BlockGraph, _ folder: String) async throws(BlockError) -> T
    ) async throws -> T {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        return try await withGraph(of: BlockProtocols.drivers) { graph throws(BlockError) -> T in
            try await folder.makeFile("disk", size: 1 << 20, on: graph.thread)
            let result: T
            do throws(BlockError) {
                result = try await body(graph, folder.path)
            } catch {
                try? await graph.closeAll()
                throw error
            }
            try await graph.closeAll()
            return result
        }
    }

    static func open(
        _ graph: BlockGraph, _ name: String, _ path: String, _ more: JSONObject = [:]
    ) async throws(BlockError) -> BlockNode {
        var options: JSONObject = [
            "driver": "file", "node-name": .string(name), "filename": .string(path),
        ]
        for (key, value) in more.members { options[key] = value }
        return try await graph.open(.object(options), monitorOwned: true)
    }

    /// The node's one user, who lets nobody else write.
    static func write(_ node: BlockNode) throws(BlockError) -> Edge {
        try node.graph.attach(
            NamedUser("test"), to: node,
            Access(uses: [.consistentRead, .write], shares: .consistentRead))
    }

    @Test func locksGoWithTheNodeAlthoughAChildProcessHasItsDescriptors() async throws {
        try await Self.withDisk { graph, folder throws(BlockError) in
            let path = "\(folder)/disk"
            let node = try await Self.open(graph, "a", path)
            let edge = try Self.write(node)
            // As in a process that was forked and has not begun its own program yet.
            let copies = Self.descriptors(of: path).map { dup($0) }
            defer { for copy in copies { close(copy) } }
            #expect(copies.count == 1)
            try await graph.detach(edge)
            try await graph.remove(node)
            let again = try Self.write(try await Self.open(graph, "b", path))
            try await graph.detach(again)
        }
    }

    // MARK: Who has a lock

    /// A writer comes while a process that nobody sees has the locks of one; they go after a time, or not.
    private static func refusal(
        unlockedAfter nanoseconds: UInt64?
    ) async throws -> BlockError? {
        let simulation = Simulation(seed: 11, .calm)
        simulation.disk.addFile("/disk", size: 8192)
        for byte in [101, 201] { simulation.disk.lockUnseen("/disk", byte) }
        return try await simulation.run { thread throws(BlockError) -> BlockError? in
            let graph = BlockGraph(on: thread, registry: DriverRegistry(BlockProtocols.drivers))
            if let nanoseconds {
                thread.spawn {
                    await thread.sleep(nanoseconds: nanoseconds)
                    simulation.disk.unlockUnseen("/disk")
                }
            }
            let node = try await Self.open(graph, "a", "/disk")
            let refusal = await Self.failure { () throws(BlockError) in
                try await graph.detach(try Self.write(node))
            }
            try await graph.closeAll()
            return refusal
        }
    }

    /// With io_uring the system ends what a process had under way after that process is gone.
    @Test func locksOfAProcessThatWasKilledAreWaitedFor() async throws {
        let refusal = try await Self.refusal(unlockedAfter: 30_000_000)
        #expect(refusal == nil)
    }

    @Test func aHolderThatCannotBeSeenIsNotTakenForThisProcess() async throws {
        let refusal = try await Self.refusal(unlockedAfter: nil)
        #expect(refusal?.code == .permissionDenied)
        #expect(
            refusal?.message
                == "'/disk' is in use: 'write' is not shared by another process "
                + "(which one cannot be seen)")
    }

    @Test func aNodeOfThisProcessThatHasTheLockIsTold() async throws {
        try await Self.withDisk { graph, folder throws(BlockError) in
            let edge = try Self.write(try await Self.open(graph, "a", "\(folder)/disk"))
            let other = try await Self.open(graph, "b", "\(folder)/disk")
            let refusal = await Self.failure { () throws(BlockError) in
                try await graph.detach(try Self.write(other))
            }
            #expect(
                refusal?.message.hasSuffix("'write' is not shared by another node of this process")
                    == true, "\(refusal?.message ?? "no refusal")")
            try await graph.detach(edge)
        }
    }

    static func descriptors(of path: String) -> [Int32] {
        var wanted = stat()
        stat(path, &wanted)
        return (3..<65_536).filter { descriptor in
            var found = stat()
            return fstat(descriptor, &found) == 0 && found.st_ino == wanted.st_ino
                && found.st_dev == wanted.st_dev
        }
    }

    // MARK: The end of a file and direct I/O

    /// Changes the end of a file of 1536 bytes, past the page cache.
    private static func changed(
        _ change: @escaping @Sendable (Edge) async throws(BlockError) -> Void
    ) async throws -> (size: Int?, bytes: [UInt8]) {
        let simulation = Simulation(seed: 3)
        simulation.disk.addFile("/disk", bytes: [UInt8](repeating: 1, count: 1536))
        try await simulation.run { thread throws(BlockError) in
            let graph = BlockGraph(on: thread, registry: DriverRegistry(BlockProtocols.drivers))
            let node = try await Self.open(graph, "a", "/disk", ["cache": ["direct": true]])
            #expect(node.limits.requestAlignment > 1536)
            let edge = try Self.write(node)
            try await change(edge)
            #expect(edge.size == 1536)
            try await edge.flush()
            try await graph.detach(edge)
            try await graph.closeAll()
        }
        var random = SeededRandom(seed: 1)
        simulation.disk.crash(.everything, using: &random)
        return (simulation.disk.size(of: "/disk"), simulation.disk.bytes(of: "/disk") ?? [])
    }

    @Test func directWritesToTheEndOfAFileDoNotMakeItLonger() async throws {
        let (size, bytes) = try await Self.changed { edge throws(BlockError) in
            let data = try IOVector(allocating: 512)
            data.fill(2)
            try await edge.write(1024, from: data)
        }
        #expect(size == 1536)
        #expect(bytes == [UInt8](repeating: 1, count: 1024) + [UInt8](repeating: 2, count: 512))
    }

    @Test func directDurableWritesToTheEndOfAFileDoNotMakeItLonger() async throws {
        let (size, bytes) = try await Self.changed { edge throws(BlockError) in
            let data = try IOVector(allocating: 1)
            data.fill(2)
            try await edge.write(1535, from: data, .fua)
        }
        #expect(size == 1536)
        #expect(bytes == [UInt8](repeating: 1, count: 1535) + [2])
    }

    @Test func directZeroesAtTheEndOfAFileDoNotMakeItLonger() async throws {
        let (size, bytes) = try await Self.changed { edge throws(BlockError) in
            try await edge.writeZeroes(ByteRange(600, 936))
        }
        #expect(size == 1536)
        #expect(bytes == [UInt8](repeating: 1, count: 600) + [UInt8](repeating: 0, count: 936))
    }

    // MARK: Closing

    /// Writes the first block of a file, flushes `flushing` times, closes, and loses the power.
    private static func written(
        flushing: Int = 0, options: JSONObject = [:], faults: [FaultRule] = []
    ) async throws -> (failure: BlockError?, bytes: [UInt8]) {
        let simulation = Simulation(seed: 5)
        simulation.disk.addFile("/disk", bytes: [UInt8](repeating: 1, count: 8192))
        simulation.faults = faults
        let failure = try await simulation.run { thread throws(BlockError) -> BlockError? in
            let graph = BlockGraph(on: thread, registry: DriverRegistry(BlockProtocols.drivers))
            let edge = try Self.write(try await Self.open(graph, "a", "/disk", options))
            let data = try IOVector(allocating: 4096)
            data.fill(2)
            try await edge.write(0, from: data)
            for _ in 0..<flushing { try? await edge.flush() }
            try await graph.detach(edge)
            do throws(BlockError) {
                try await graph.closeAll()
            } catch {
                return error
            }
            return nil
        }
        var random = SeededRandom(seed: 1)
        simulation.disk.crash(.everything, using: &random)
        return (failure, simulation.disk.bytes(of: "/disk") ?? [])
    }

    @Test func closingMakesDurableWhatNobodyFlushed() async throws {
        let (failure, bytes) = try await Self.written()
        #expect(failure == nil)
        #expect(bytes.first == 2)
    }

    @Test func closingDoesNotFlushWhatIsNotToBeFlushed() async throws {
        let (failure, bytes) = try await Self.written(options: ["cache": ["no-flush": true]])
        #expect(failure == nil)
        #expect(bytes.first == 1)
    }

    /// Copies of more than memory holds go on without what they wrote: the system tells of what did not
    /// get to the storage when the page cache drops it, and never again.
    @Test(arguments: [EIO, ENOSPC])
    func aStreamThatDidNotGetToStorageIsToldByFlushesDurableWritesAndTheEnd(
        error: Int32
    ) async throws {
        let simulation = Simulation(seed: 7, .calm)
        simulation.disk.addFile("/disk", size: 64 << 20)
        simulation.faults = [FaultRule(.writeBack, path: "/disk", .fail(error), times: 1)]
        let failures = try await simulation.run { thread throws(BlockError) -> [BlockError?] in
            let graph = BlockGraph(on: thread, registry: DriverRegistry(BlockProtocols.drivers))
            let node = try await Self.open(graph, "a", "/disk")
            (node.driver as? FileDriver)?.isStreaming = true
            let edge = try Self.write(node)
            let data = try IOVector(allocating: 4 << 20)
            data.fill(2)
            for index in 0..<12 { try await edge.write(index << 22, from: data) }
            let last = data.slice(0, 4096)
            let failures = [
                await Self.failure { () throws(BlockError) in
                    try await edge.write(0, from: last, .fua)
                },
                await Self.failure { () throws(BlockError) in try await edge.flush() },
                await Self.failure { () throws(BlockError) in try await edge.flush() },
            ]
            try await graph.detach(edge)
            return failures + [
                await Self.failure { () throws(BlockError) in try await graph.closeAll() }
            ]
        }
        #expect(failures.map { $0?.systemError } == Array(repeating: error, count: 4))
    }

    private static func failure(
        _ body: () async throws(BlockError) -> Void
    ) async -> BlockError? {
        do throws(BlockError) {
            try await body()
            return nil
        } catch { return error }
    }

    @Test(arguments: [0, 1])
    func closingTellsOfAFlushThatFailed(before flushes: Int) async throws {
        let (failure, _) = try await Self.written(
            flushing: flushes,
            faults: [FaultRule(.synchronize, path: "/disk", .fail(EIO), times: 1)])
        #expect(failure?.node == "a")
    }
}
