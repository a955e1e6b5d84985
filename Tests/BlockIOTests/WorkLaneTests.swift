import BlockCore
import Synchronization
import Testing

@testable import BlockIO

#if canImport(Glibc)
import Glibc
#endif

private final class Seen: Sendable {
    let state = Mutex<(order: [Int], running: Int, most: Int)>(([], 0, 0))
}

private final class Failures: Sendable {
    let count = Mutex(0)
}

@Suite struct WorkLaneTests {
    @Test func workIsDoneInOrderAndOnePieceAtATime() async {
        let lane = WorkLane()
        let seen = Seen()
        await withUnsafeContinuation { (done: UnsafeContinuation<Void, Never>) in
            for index in 0..<2000 {
                lane.submit {
                    seen.state.withLock {
                        $0.running += 1
                        $0.most = max($0.most, $0.running)
                    }
                    seen.state.withLock {
                        $0.order.append(index)
                        $0.running -= 1
                    }
                    if index == 1999 { done.resume() }
                }
            }
        }
        let (order, most) = seen.state.withLock { ($0.order, $0.most) }
        #expect(order == Array(0..<2000))
        #expect(most == 1)
    }

    @Test func aLaneThatCameToRestGoesOn() async {
        let lane = WorkLane()
        for _ in 0..<100 {
            await withUnsafeContinuation { (done: UnsafeContinuation<Void, Never>) in
                lane.submit { done.resume() }
            }
        }
    }

    @Test func longWritesToOneFileArriveWhole() async throws {
        let path = "/tmp/merino-lane-\(UInt64.random(in: 0 ... .max))"
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let wrong = try await thread.run { () async throws(BlockError) -> Int in
            let file = try await File.open(
                path, FileOptions(writable: true, create: true), on: thread)
            let count = 600 << 10
            let failures = Failures()
            var tasks: [Task<Void, Never>] = []
            for index in 0..<12 {
                tasks.append(
                    thread.spawn {
                        do throws(BlockError) {
                            let vector = try IOVector(allocating: count)
                            vector.fill(UInt8(index + 1))
                            try await file.write(vector, at: index * count)
                        } catch { failures.count.withLock { $0 += 1 } }
                    })
            }
            for task in tasks { await task.value }
            var wrong = failures.count.withLock { $0 }
            for index in 0..<12 {
                let vector = try IOVector(allocating: count)
                let read = try await file.read(vector, at: index * count)
                if read != count || vector.array.contains(where: { $0 != UInt8(index + 1) }) {
                    wrong += 1
                }
            }
            await file.close()
            return wrong
        }
        unlink(path)
        #expect(wrong == 0)
    }
}
