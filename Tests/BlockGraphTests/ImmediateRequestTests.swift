import BlockCore
import BlockIO
import Testing

@testable import BlockGraph

/// What passes without waiting is what would pass anyway, and nothing that has to wait.
@Suite struct ImmediateRequestTests {
    private static let readWrite = Access(uses: [.consistentRead, .write, .resize], shares: .all)

    /// Runs `body` with a user's edge to a disk in memory of 64 KiB, aligned to 512 bytes.
    private func withEdge<T: Sendable>(
        _ access: Access = readWrite,
        _ body: @escaping @Sendable (BlockGraph, Edge, MemoryDriver) async throws(BlockError) -> T
    ) async throws -> T {
        try await withGraph { graph throws(BlockError) in
            let node = try await graph.memory("disk", align: 512)
            let edge = try graph.attach(NamedUser("test"), to: node, access)
            guard let driver = node.driver as? MemoryDriver else {
                throw BlockError(.invalidArgument, "another driver")
            }
            return try await body(graph, edge, driver)
        }
    }

    private static func data(_ count: Int, _ value: UInt8 = 7) throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: count)
        vector.fill(value)
        return vector
    }

    @Test func plainRequestsPassAndAreCounted() async throws {
        let (read, written, reads, writes, byte) = try await withEdge {
            (_, edge, driver) throws(BlockError) in
            let read = edge.readNow(1024, into: try Self.data(512))
            let written = edge.writeNow(1024, from: try Self.data(512))
            return (
                read, written, edge.statistics[.read].requests,
                edge.statistics[.write].requests, driver.bytes[1024]
            )
        }
        #expect(read && written && reads == 1 && writes == 1 && byte == 7)
    }

    @Test(arguments: [(-512, 512), (0, 0), (100, 512), (0, 100), (65536, 512), (65024, 1024)])
    func nothingOffTheEndOrUnalignedPasses(_ offset: Int, _ count: Int) async throws {
        let passed = try await withEdge { (_, edge, _) throws(BlockError) in
            let data = try Self.data(max(count, 0))
            return [edge.readNow(offset, into: data), edge.writeNow(offset, from: data)]
        }
        #expect(passed == [false, false])
    }

    @Test func aDrainedGraphIsLeftAlone() async throws {
        let passed = try await withEdge { (graph, edge, _) throws(BlockError) in
            try await graph.drained([edge.node]) { () throws(BlockError) in
                [
                    edge.readNow(0, into: try Self.data(512)),
                    edge.writeNow(0, from: try Self.data(512)),
                ]
            }
        }
        #expect(passed == [false, false])
    }

    @Test func withoutPermissionNothingPasses() async throws {
        let passed = try await withEdge(Access(uses: [], shares: .all)) {
            (_, edge, _) throws(BlockError) in
            [
                edge.readNow(0, into: try Self.data(512)),
                edge.writeNow(0, from: try Self.data(512)),
            ]
        }
        #expect(passed == [false, false])
    }

    @Test func writesWaitForASerialisingOne() async throws {
        let (during, after) = try await withEdge { (_, edge, _) throws(BlockError) in
            let task = edge.node.thread.spawn {
                // Unaligned: read, modified and written with nothing in between.
                try? await edge.write(10, from: try Self.data(20))
            }
            let during = edge.writeNow(0, from: try Self.data(512))
            await task.value
            return (during, edge.writeNow(0, from: try Self.data(512)))
        }
        #expect(!during && after)
    }

    @Test func aWriteThatWaitedForAShrinkIsRefused() async throws {
        let (code, size) = try await withEdge { (_, edge, driver) throws(BlockError) in
            driver.yieldsInResize = true
            let task = edge.node.thread.spawn { try? await edge.resize(to: 4096) }
            var code: BlockError.Code?
            do throws(BlockError) {
                try await edge.write(8192, from: try Self.data(512))
            } catch { code = error.code }
            await task.value
            return (code, driver.bytes.count)
        }
        #expect(code == .outOfRange && size == 4096)
    }

    @Test func writeThroughIsNotServedFromTheCache() async throws {
        let passed = try await withEdge { (_, edge, _) throws(BlockError) in
            edge.isWriteThrough = true
            return edge.writeNow(0, from: try Self.data(512))
        }
        #expect(!passed)
    }

    @Test func observersLearnOfTheWrite() async throws {
        let ranges = try await withEdge { (_, edge, _) throws(BlockError) in
            let log = ChangeLog()
            edge.node.addWriteObserver(log)
            _ = edge.writeNow(512, from: try Self.data(1024))
            return log.ranges
        }
        #expect(ranges == [ByteRange(512, 1024)])
    }

    @Test func whatTheDriverCannotServeCountsForNothing() async throws {
        let (passed, count) = try await withEdge { (_, edge, driver) throws(BlockError) in
            driver.servesAtOnce = false
            let passed = [
                edge.readNow(0, into: try Self.data(512)),
                edge.writeNow(0, from: try Self.data(512)),
            ]
            return (
                passed,
                edge.statistics[.read].requests + edge.statistics[.write].requests
            )
        }
        #expect(passed == [false, false] && count == 0)
    }
}

private final class ChangeLog: WriteObserver {
    var ranges: [ByteRange] = []
    func changed(_ range: ByteRange) { ranges.append(range) }
}
