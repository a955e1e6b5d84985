import BlockCore
import BlockIO
import Synchronization
import Testing

#if canImport(Glibc)
import Glibc
#endif

/// What tasks on several threads tell.
private final class Shared<Value: Sendable>: Sendable {
    private let value: Mutex<Value>
    init(_ value: Value) { self.value = Mutex(value) }
    func withLock<T: Sendable>(_ body: @Sendable (inout Value) -> T) -> T {
        value.withLock { body(&$0) }
    }
}

/// Tasks that go from thread to thread with their seat, on both engines.
@Suite struct IOSeatTests {
    private static func with<T: Sendable>(
        _ engine: EngineChoice,
        _ body: @escaping @Sendable (IOThread, IOThread) async throws(BlockError) -> T
    ) async throws -> T {
        let other = try IOThread(name: "other") { () throws(BlockError) in try engine.makeEngine() }
        defer { other.stop() }
        return try await withThread(engine) { thread throws(BlockError) in
            try await body(thread, other)
        }
    }

    @Test(arguments: engines) func visitsGoThereAndComeBack(engine: EngineChoice) async throws {
        let places = try await Self.with(engine) { thread, other throws(BlockError) in
            var places: [Bool] = []
            let number = try await other.visit { () throws(BlockError) in
                places.append(other.isCurrent)
                await other.sleep(nanoseconds: 1000)
                places.append(other.isCurrent)
                try await thread.visit { () throws(BlockError) in places.append(thread.isCurrent) }
                places.append(other.isCurrent)
                return 7
            }
            places.append(thread.isCurrent && number == 7)
            do throws(BlockError) {
                try await other.visit { () throws(BlockError) in
                    throw BlockError(.cancelled, "on purpose")
                }
            } catch {
                places.append(thread.isCurrent && error.code == .cancelled)
            }
            return places
        }
        #expect(places == [true, true, true, true, true, true])
    }

    @Test(arguments: engines) func whatWaitsGoesOnWhereTheSeatIsByThen(
        engine: EngineChoice
    ) async throws {
        let places = try await Self.with(engine) { thread, other throws(BlockError) in
            let seat = IOSeat(on: thread)
            let places = Shared<[Bool]>([])
            let done = Shared(0)
            let timer = IOTimer(on: seat)
            // One sleeps, one waits for a timer that is called off, one is ready to go on.
            seat.spawn {
                let passed = await IOTimer(on: seat).wait(nanoseconds: 5_000_000)
                places.withLock { $0.append(passed && other.isCurrent) }
                done.withLock { $0 += 1 }
            }
            seat.spawn {
                let passed = await timer.wait(nanoseconds: .max)
                places.withLock { $0.append(!passed && other.isCurrent) }
                done.withLock { $0 += 1 }
            }
            seat.spawn {
                await Task.yield()
                places.withLock { $0.append(other.isCurrent) }
                timer.cancel()
                done.withLock { $0 += 1 }
            }
            seat.move(to: other)
            while done.withLock({ $0 < 3 }) { await thread.sleep(nanoseconds: 100_000) }
            return places.withLock { $0 }
        }
        #expect(places == [true, true, true])
    }

    @Test(arguments: engines) func aSocketMovesWithAReceiveUnderWay(
        engine: EngineChoice
    ) async throws {
        let text = try await Self.with(engine) { thread, other throws(BlockError) in
            var ends: [Int32] = [0, 0]
            guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0 else {
                throw .system("socketpair", errno)
            }
            for end in ends { _ = fcntl(end, F_SETFL, O_NONBLOCK) }
            let (near, far) = (ends[0], ends[1])
            defer { close(far) }
            let seat = IOSeat(on: thread)
            let socket = Socket(IOHandle(near), on: thread)
            let received = Shared<[UInt8]>([])
            let isDone = Shared(false)
            seat.spawn {
                do throws(BlockError) {
                    let memory = try IOVector(allocating: 64)
                    while true {
                        let count = try await socket.receive(memory)
                        guard count > 0 else { break }
                        let isThere = socket.thread.isCurrent
                        let bytes = memory.slice(0, count).array
                        received.withLock { $0 += isThere ? bytes : [] }
                    }
                } catch {
                    received.withLock { $0 = Array("\(error)".utf8) }
                }
                socket.close()
                isDone.withLock { $0 = true }
            }
            func say(_ text: String) { _ = write(far, text, text.utf8.count) }
            for round in 0..<20 {
                let (here, there) = round % 2 == 0 ? (thread, other) : (other, thread)
                if round % 3 == 0 { say("a") }
                try await here.visit { () throws(BlockError) in
                    socket.move(to: there)
                    seat.move(to: there)
                }
                say("b")
                if round % 4 == 0 { await thread.sleep(nanoseconds: 300_000) }
            }
            shutdown(far, Int32(SHUT_WR))
            while !isDone.withLock({ $0 }) { await thread.sleep(nanoseconds: 100_000) }
            return String(decoding: received.withLock { $0 }, as: UTF8.self)
        }
        #expect(text == String(repeating: "abbb", count: 6) + "abb")
    }

    @Test(arguments: engines) func aThreadThatRetiresSendsSleepersOn(
        engine: EngineChoice
    ) async throws {
        let passed = try await withThread(engine) { thread throws(BlockError) in
            let other = try IOThread(name: "other") { () throws(BlockError) in
                try engine.makeEngine()
            }
            let seat = IOSeat(on: other)
            let outcome = Shared<Bool?>(nil)
            try await other.visit { () throws(BlockError) in
                seat.spawn {
                    let passed = await IOTimer(on: seat).wait(nanoseconds: 20_000_000)
                    outcome.withLock { $0 = passed && thread.isCurrent }
                }
                seat.move(to: thread)
            }
            other.retire()
            while true {
                if let passed = outcome.withLock({ $0 }) { return passed }
                await thread.sleep(nanoseconds: 1_000_000)
            }
        }
        #expect(passed)
    }
}
