import BlockCore
import BlockIO
import CBlockTesting
import Testing

#if canImport(Glibc)
import Glibc
#endif

/// What engines and threads do when there is a lot of it, or when it goes wrong.
@Suite struct EngineStressTests {
    #if os(Linux)
    @Test func theAutomaticChoiceIsThreadsWhereTheRingIsRefused() async throws {
        let thread = try IOThread(name: "sandboxed") { () throws(BlockError) in
            let failure = testing_refuse_io_uring()
            if failure != 0 { throw .system("cannot filter system calls", failure) }
            return try EngineChoice.automatic.makeEngine()
        }
        defer { thread.stop() }
        let name = try await thread.run { () async throws(BlockError) in thread.engine.name }
        #expect(name == "threads")
    }

    @Test func theRingByNameIsAnErrorWhereItIsRefused() {
        let error = #expect(throws: BlockError.self) {
            _ = try IOThread(name: "sandboxed") { () throws(BlockError) in
                _ = testing_refuse_io_uring()
                return try EngineChoice.uring.makeEngine()
            }
        }
        #expect(error?.code == .unsupported)
        #expect(error?.remedy?.contains("MERINO_IO_ENGINE=threads") == true)
    }

    @Test func aCancelledSignalSourceEndsItsWaitAndThoseToCome() async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let signals = try await thread.run { () async throws(BlockError) in
            let source = try SignalSource([SIGWINCH], on: thread)
            thread.spawn {
                await thread.yield()
                source.cancel()
            }
            return [await source.next(), await source.next()]
        }
        #expect(signals == [nil, nil])
    }
    #endif

    @Test(arguments: engines) func threadsThatStopGiveTheirDescriptorsBack(engine: EngineChoice)
        async throws
    {
        // Other tests have some open, too; a leak here would be hundreds.
        let before = openDescriptorCount()
        for _ in 0..<200 {
            let thread = try IOThread(name: "brief") { () throws(BlockError) in
                try choiceMade(engine)
            }
            thread.stop()
        }
        var count = openDescriptorCount()
        for _ in 0..<2000 where count > before + 100 {
            usleep(5000)
            count = openDescriptorCount()
        }
        #expect(count <= before + 100)
    }

    @Test(arguments: engines) func jobsFromManyThreadsAllRun(engine: EngineChoice) async throws {
        let thread = try IOThread(name: "test") { () throws(BlockError) in try choiceMade(engine) }
        defer { thread.stop() }
        final class Counter: @unchecked Sendable { var value = 0 }
        let counter = Counter()
        try await withThrowingTaskGroup(of: Void.self) { group in
            for _ in 0..<8 {
                group.addTask {
                    for _ in 0..<500 {
                        try await thread.run { () async throws(BlockError) in
                            counter.value += 1
                            await thread.yield()
                        }
                    }
                }
            }
            try await group.waitForAll()
        }
        let value = try await thread.run { () async throws(BlockError) in counter.value }
        #expect(value == 4000)
    }

    @Test(arguments: engines) func cancellingEndsEachPendingOperationOnce(engine: EngineChoice)
        async throws
    {
        let temporary = TemporaryPath()
        let results = try await withThread(engine) { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: temporary.path), thread: thread)
            final class Results: @unchecked Sendable { var values: [Int] = [] }
            let results = Results()
            // Tokens are used again and again: a completion that came twice would show.
            for _ in 0..<50 {
                for _ in 0..<4 {
                    thread.spawn {
                        results.values.append(await thread.perform(.accept(listener.handle)))
                    }
                }
                await thread.yield()
                thread.engine.cancelAll(on: listener.handle)
                while results.values.count % 4 != 0 || results.values.isEmpty {
                    await thread.yield()
                }
            }
            while results.values.count < 200 { await thread.yield() }
            listener.close()
            return results.values
        }
        #expect(results.count == 200)
        #expect(results.allSatisfy { $0 == -Int(ECANCELED) })
    }

    @Test(arguments: engines) func aSlowReaderGetsEveryByte(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let same = try await withThread(engine) { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: temporary.path), thread: thread)
            defer { listener.close() }
            let socket = try await Socket.connect(to: .unix(path: temporary.path), on: thread)
            guard let peer = try await listener.accept() else { return false }
            // Many parts, of sizes that fit nothing.
            var sent = IOVector()
            for index in 0..<300 {
                let count = 7919 + index
                let slice = try IOBuffer(count: count).prefix(count)
                slice.bytes.initializeMemory(as: UInt8.self, repeating: UInt8(index & 255))
                sent.append(slice)
            }
            let whole = sent
            let task = thread.spawn { try? await socket.send(whole) }
            let back = try IOVector(allocating: whole.count)
            var done = 0
            while done < back.count {
                if done % 3 == 0 { await thread.sleep(nanoseconds: 200_000) }
                let part = min(50_000, back.count - done)
                done += try await peer.receive(back.slice(done, part))
            }
            await task.value
            socket.close()
            peer.close()
            return back.array == whole.array
        }
        #expect(same)
    }

    @Test(arguments: engines) func aSocketEndsInEveryState(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let outcomes = try await withThread(engine) { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: temporary.path), thread: thread)
            defer { listener.close() }
            var outcomes: [String] = []
            func pair() async throws(BlockError) -> (Socket, Socket) {
                let socket = try await Socket.connect(to: .unix(path: temporary.path), on: thread)
                guard let peer = try await listener.accept() else {
                    throw BlockError(.disconnected, "no peer")
                }
                return (socket, peer)
            }
            let byte = try IOVector(allocating: 1)
            byte.fill(1)
            // Shut down while it receives.
            let (first, firstPeer) = try await pair()
            thread.spawn {
                await thread.yield()
                first.shutdown()
            }
            outcomes.append("receive \(try await first.receive(byte))")
            // Sending afterwards.
            do throws(BlockError) {
                try await first.send(byte)
                outcomes.append("sent")
            } catch {
                outcomes.append("send \(error.code)")
            }
            first.close()
            // The peer of a closed socket.
            outcomes.append("peer \(try await firstPeer.receive(byte))")
            firstPeer.close()
            // A closed socket.
            outcomes.append("closed \(try await firstPeer.receive(byte))")
            do throws(BlockError) {
                try await firstPeer.send(byte)
                outcomes.append("sent")
            } catch {
                outcomes.append("send \(error.code)")
            }
            // Shut down while it sends more than fits.
            let (second, secondPeer) = try await pair()
            thread.spawn {
                await thread.sleep(nanoseconds: 2_000_000)
                second.shutdown()
            }
            do throws(BlockError) {
                try await second.send(try IOVector(allocating: 8 << 20))
                outcomes.append("sent")
            } catch {
                outcomes.append("send \(error.code)")
            }
            second.close()
            secondPeer.close()
            return outcomes
        }
        #expect(
            outcomes == [
                "receive 0", "send disconnected", "peer 0", "closed 0", "send disconnected",
                "send disconnected",
            ])
    }

    @Test(arguments: engines) func manySocketsWaitAtOnce(engine: EngineChoice) async throws {
        let temporary = TemporaryPath()
        let received = try await withThread(engine) { thread throws(BlockError) in
            let listener = try Listener(on: .unix(path: temporary.path), thread: thread)
            defer { listener.close() }
            final class Received: @unchecked Sendable { var values: [Int] = [] }
            let received = Received()
            var sockets: [Socket] = []
            for index in 0..<100 {
                sockets.append(
                    try await Socket.connect(to: .unix(path: temporary.path), on: thread))
                guard let peer = try await listener.accept() else { continue }
                thread.spawn {
                    guard let byte = try? IOVector(allocating: 1) else { return }
                    if let count = try? await peer.receive(byte), count == 1 {
                        received.values.append(index)
                    }
                    peer.close()
                }
            }
            let byte = try IOVector(allocating: 1)
            byte.fill(1)
            var expected = 0
            for socket in sockets.reversed() {
                try await socket.send(byte)
                expected += 1
                while received.values.count < expected { await thread.yield() }
            }
            for socket in sockets { socket.close() }
            return received.values
        }
        #expect(received == Array((0..<100).reversed()))
    }

    #if os(Linux)
    @Test(arguments: engines, [false, true])
    func aFullDeviceSaysSo(engine: EngineChoice, durable: Bool) async throws {
        let code = try await withThread(engine) { thread throws(BlockError) in
            let file = try await File.open("/dev/full", FileOptions(writable: true), on: thread)
            let data = try IOVector(allocating: 4096)
            data.fill(1)
            var code: BlockError.Code?
            do throws(BlockError) {
                try await file.write(data, at: 0, durable: durable)
            } catch {
                code = error.code
            }
            await file.close()
            return code
        }
        #expect(code == .noSpace)
    }
    #endif

    @Test(arguments: engines) func writesOfOneAndOfManyPartsGoThroughTheEngine(
        engine: EngineChoice
    ) async throws {
        let temporary = TemporaryPath()
        let bytes = try await withThread(engine) { thread throws(BlockError) in
            let file = try await File.open(
                temporary.path, FileOptions(writable: true, create: true), on: thread)
            let data = try IOVector(allocating: 4096)
            data.fill(1)
            var scattered = IOVector()
            for value in [2, 3, 4] as [UInt8] {
                let slice = try IOBuffer(count: 1000).prefix(1000)
                slice.bytes.initializeMemory(as: UInt8.self, repeating: value)
                scattered.append(slice)
            }
            // Past the short way of `File`.
            var results: [Int] = []
            for durable in [false, true] {
                results.append(
                    await thread.perform(
                        .write(file.handle, data, offset: 0, durable: durable)))
                results.append(
                    await thread.perform(
                        .write(file.handle, scattered, offset: 4096, durable: durable)))
            }
            let back = try IOVector(allocating: 8192)
            results.append(await thread.perform(.read(file.handle, back, offset: 0)))
            await file.close()
            let array = back.array
            return results + [0, 4095, 4096, 7095].map { Int(array[$0]) }
        }
        #expect(bytes == [4096, 3000, 4096, 3000, 7096, 1, 1, 2, 4])
    }
}

private func choiceMade(_ choice: EngineChoice) throws(BlockError) -> any IOEngine {
    try choice.makeEngine()
}

private func openDescriptorCount() -> Int {
    guard let folder = opendir("/proc/self/fd") ?? opendir("/dev/fd") else { return 0 }
    defer { closedir(folder) }
    var count = 0
    while readdir(folder) != nil { count += 1 }
    return count
}
