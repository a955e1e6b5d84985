import BlockCore
import BlockIO
import Testing

#if canImport(Glibc)
import Glibc
#endif

/// Both engines: each test runs on every one that the machine allows.
let engines: [EngineChoice] = {
    #if os(Linux)
    if (try? IOThread(
        name: "probe", engine: { () throws(BlockError) in try EngineChoice.uring.makeEngine() }
    ).stop()) != nil {
        return [.uring, .threads]
    }
    #endif
    return [.threads]
}()

func withThread<T: Sendable>(
    _ choice: EngineChoice, _ body: @escaping @Sendable (IOThread) async throws(BlockError) -> T
) async throws -> T {
    let thread = try IOThread(name: "test") { () throws(BlockError) in try choice.makeEngine() }
    defer { thread.stop() }
    return try await thread.run { () async throws(BlockError) -> T in try await body(thread) }
}

/// A private path that is removed at the end.
final class TemporaryPath: Sendable {
    let path: String
    init() { path = "/tmp/merino-test-\(getpid())-\(UInt64.random(in: 0 ... .max))" }
    deinit { unlink(path) }
}

@Suite struct IOThreadTests {
    @Test(arguments: engines) func tasksRunOnTheThread(engine: EngineChoice) async throws {
        let values = try await withThread(engine) { thread throws(BlockError) in
            var result: [Bool] = [thread.isCurrent]
            await thread.yield()
            result.append(thread.isCurrent)
            await thread.sleep(nanoseconds: 1_000_000)
            result.append(thread.isCurrent)
            let other = await thread.offload { thread.isCurrent }
            result.append(!other)
            result.append(thread.isCurrent)
            return result
        }
        #expect(values == [true, true, true, true, true])
    }

    @Test(arguments: engines) func spawnOnTheThreadBeginsAtOnce(engine: EngineChoice) async throws {
        let began = try await withThread(engine) { thread throws(BlockError) in
            final class Flag: @unchecked Sendable { var value = false }
            let flag = Flag()
            thread.spawn { flag.value = true }
            return flag.value
        }
        #expect(began)
    }

    @Test(arguments: engines) func readsWhatWasWritten(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let bytes = try await withThread(engine) { thread throws(BlockError) in
            let file = try await File.open(
                temporary.path, FileOptions(writable: true, create: true), on: thread)
            var vector = IOVector()
            for index in 0..<5 {
                let buffer = try IOBuffer(count: 1000)
                let slice = buffer.prefix(1000)
                slice.bytes.initializeMemory(as: UInt8.self, repeating: UInt8(index + 1))
                vector.append(slice)
            }
            try await file.write(vector, at: 10)
            try await file.write(vector.slice(0, 10), at: 6000, durable: true)
            try await file.synchronize()
            let target = try IOVector(allocating: 7000)
            target.fill(9)
            let count = try await file.read(target, at: 0)
            await file.close()
            return [UInt8(count == 6010 ? 1 : 0)] + target.array
        }
        #expect(bytes[0] == 1)
        #expect(bytes[1] == 0 && bytes[11] == 1 && bytes[1011] == 2 && bytes[5010] == 5)
        #expect(bytes[6001] == 1 && bytes[6010] == 1 && bytes[6011] == 9)
    }

    @Test(arguments: engines) func directReadsWork(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let result = try await withThread(engine) { thread throws(BlockError) in
            let file = try await File.open(
                temporary.path, FileOptions(writable: true, direct: true, create: true), on: thread)
            let vector = try IOVector(allocating: 8192)
            vector.fill(7)
            try await file.write(vector, at: 4096)
            let back = try IOVector(allocating: 4096)
            _ = try await file.read(back, at: 8192)
            let status = try await file.status()
            await file.close()
            return (back.array, status.size, status.directAlignment)
        }
        #expect(result.0.allSatisfy { $0 == 7 })
        #expect(result.1 == 12288 && result.2 == 4096)
    }

    @Test(arguments: engines) func failuresCarryTheSystemsError(engine: EngineChoice) async throws {
        await #expect(throws: BlockError.self) {
            try await withThread(engine) { thread throws(BlockError) in
                _ = try await File.open(
                    "/nonexistent/file", FileOptions(writable: false), on: thread)
            }
        }
    }

    @Test(arguments: engines) func socketsCarryBytesBothWays(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let echoed = try await withThread(engine) { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: temporary.path), thread: thread)
            thread.spawn {
                guard let peer = try? await listener.accept(),
                    let buffer = try? IOVector(allocating: 65536)
                else { return }
                while let count = try? await peer.receive(buffer), count > 0 {
                    try? await peer.send(buffer.slice(0, count))
                }
                peer.close()
            }
            let socket = try await Socket.connect(
                to: .unix(path: temporary.path), on: thread)
            let sent = try IOVector(allocating: 1 << 20)
            for index in 0..<16 { sent.slice(index << 16, 1 << 16).fill(UInt8(index)) }
            thread.spawn { try? await socket.send(sent) }
            let back = try IOVector(allocating: 1 << 20)
            let whole = try await socket.receiveAll(back)
            socket.shutdown()
            socket.close()
            listener.close()
            let after = try await listener.accept()
            return whole && after == nil && back.array == sent.array
        }
        #expect(echoed)
        #expect(access(temporary.path, F_OK) != 0)
    }

    @Test(arguments: engines) func closingTheListenerEndsAPendingAccept(engine: EngineChoice)
        async throws
    {
        let temporary = TemporaryPath()
        let ended = try await withThread(engine) { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: temporary.path), thread: thread)
            thread.spawn {
                await thread.sleep(nanoseconds: 5_000_000)
                listener.close()
            }
            return try await listener.accept() == nil
        }
        #expect(ended)
    }

    @Test(arguments: engines) func aTimerCanBeCancelled(engine: EngineChoice) async throws {
        let passed = try await withThread(engine) { thread throws(BlockError) in
            let timer = IOTimer(on: thread)
            thread.spawn { timer.cancel() }
            let first = await timer.wait(nanoseconds: 60_000_000_000)
            let second = await IOTimer(on: thread).wait(nanoseconds: 1_000_000)
            return [first, second]
        }
        #expect(passed == [false, true])
    }

    @Test(arguments: engines) func locksKeepOthersOut(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let granted = try await withThread(engine) { thread throws(BlockError) in
            let first = try await File.open(
                temporary.path, FileOptions(writable: true, create: true), on: thread)
            let second = try await File.open(
                temporary.path, FileOptions(writable: true), on: thread)
            let range = ByteRange(100, 1)
            let results = [
                try first.lock(range, .shared), try second.lock(range, .shared),
                try second.canLock(range, .exclusive), try second.lock(range, .none),
                try second.canLock(range, .exclusive), try first.lock(range, .none),
                try second.canLock(range, .exclusive),
            ]
            await first.close()
            await second.close()
            return results
        }
        #expect(granted == [true, true, false, true, false, true, true])
    }

    @Test(arguments: engines) func holesAreFound(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let extents = try await withThread(engine) { thread throws(BlockError) in
            let file = try await File.open(
                temporary.path, FileOptions(writable: true, create: true), on: thread)
            try await file.setSize(1 << 20)
            let vector = try IOVector(allocating: 65536)
            vector.fill(1)
            try await file.write(vector, at: 1 << 18)
            var result: [Int] = []
            var offset = 0
            while let extent = try await file.extent(at: offset) {
                result.append(extent.isData ? extent.end : -extent.end)
                offset = extent.end
            }
            await file.close()
            return result
        }
        #expect(extents == [-(1 << 18), (1 << 18) + 65536, -(1 << 20)])
    }
}
