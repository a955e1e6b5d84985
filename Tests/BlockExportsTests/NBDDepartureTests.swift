import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import Testing

@testable import BlockExports

/// A large disk on which each read, and each question for block status, takes a millisecond.
private final class PatientDriver: IdleDriver, @unchecked Sendable {
    static let size = 1 << 44

    private let node: BlockNode
    private(set) var requestCount = 0

    init(_ node: BlockNode) {
        self.node = node
        node.size = Self.size
    }

    private func takeTime() async {
        requestCount += 1
        await node.thread.sleep(nanoseconds: 1_000_000)
    }

    func read(_ offset: Int, into vector: IOVector, _ flags: ReadFlags) async throws(BlockError) {
        await takeTime()
    }

    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        await takeTime()
        answer.append(BlockStatus([.data], count: min(range.count, 4_096)))
    }

    static let description = DriverDescription(
        name: "patient", kind: .storage,
        open: { opening throws(BlockError) in PatientDriver(opening.node) })
}

/// What a server does when clients leave, on a simulated machine: its clock alone passes.
@Suite struct NBDDepartureTests {
    /// A server on the Unix socket `/s` with the export `disk`.
    private struct Place {
        let thread: IOThread
        let server: NBDServer
        let driver: PatientDriver

        func client(_ bytes: [UInt8] = []) async throws(BlockError) -> Socket {
            let client = try await Socket.connect(to: .unix(path: "/s"), on: thread)
            if bytes.isEmpty { return client }
            let memory = try IOVector(allocating: bytes.count)
            bytes.withUnsafeBytes { memory.copy(from: $0) }
            try await client.send(memory)
            return client
        }

        func pass(milliseconds: UInt64) async {
            await thread.sleep(nanoseconds: milliseconds * 1_000_000)
        }
    }

    private static func withServer(
        _ body: @escaping @Sendable (Place) async throws(BlockError) -> Void
    ) async throws {
        try await Simulation(seed: 7).run { thread throws(BlockError) in
            let graph = BlockGraph(
                on: thread, registry: DriverRegistry([PatientDriver.description]))
            let node = try await graph.open(
                ["driver": "patient", "node-name": "disk"], monitorOwned: true)
            guard let driver = node.driver as? PatientDriver else { return }
            let server = NBDServer(on: thread)
            try server.add(try NBDExport(name: "disk", node: node, writable: false))
            server.listen(on: try Listener(on: .unix(path: "/s"), thread: thread))
            try await body(Place(thread: thread, server: server, driver: driver))
            try await server.stop()
            try await graph.closeAll()
        }
    }

    private final class Counter: @unchecked Sendable {
        var count = 0
    }

    @Test func onlyTheLastClientThatUsedAnExportIsTold() async throws {
        try await Self.withServer { place throws(BlockError) in
            let told = Counter()
            place.server.lastClientLeft = { told.count += 1 }
            let strangers: [[UInt8]] = [
                [], RawClient.flags, RawClient.flags + RawClient.option(3) + RawClient.option(2),
                RawClient.flags + RawClient.go("another"), [0xff, 0xff, 0xff, 0xff],
            ]
            for bytes in strangers {
                let stranger = try await place.client(bytes)
                await place.pass(milliseconds: 10)
                stranger.close()
                await place.pass(milliseconds: 10)
                #expect(place.server.clientCount == 0)
                #expect(told.count == 0, "\(bytes)")
            }
            let user = try await place.client(RawClient.flags + RawClient.go("disk"))
            await place.pass(milliseconds: 10)
            user.close()
            await place.pass(milliseconds: 10)
            #expect(told.count == 1)
        }
    }

    @Test func aStrangerThatIsStillThereIsWaitedForWhenTheLastUserHasLeft() async throws {
        try await Self.withServer { place throws(BlockError) in
            let told = Counter()
            place.server.lastClientLeft = { told.count += 1 }
            let stranger = try await place.client()
            let user = try await place.client(RawClient.flags + RawClient.go("disk"))
            await place.pass(milliseconds: 10)
            user.close()
            await place.pass(milliseconds: 10)
            #expect(place.server.clientCount == 1 && told.count == 0)
            stranger.close()
            await place.pass(milliseconds: 10)
            #expect(told.count == 1)
        }
    }

    private static let extended = RawClient.flags + RawClient.option(11)

    /// Requests that would take hours.
    @Test(arguments: [
        extended + RawClient.go("disk")
            + RawClient.extendedRequest(5, 0, UInt64(PatientDriver.size)),
        extended + RawClient.contexts("disk", ["base:allocation"]) + RawClient.go("disk")
            + RawClient.extendedRequest(7, 0, UInt64(PatientDriver.size)),
    ])
    func longRequestsOfAClientThatLeftEnd(bytes: [UInt8]) async throws {
        try await Self.withServer { place throws(BlockError) in
            let client = try await place.client(bytes)
            await place.pass(milliseconds: 50)
            #expect(place.driver.requestCount > 10)
            client.close()
            await place.pass(milliseconds: 50)
            #expect(place.server.clientCount == 0)
            #expect(place.driver.requestCount < 100)
        }
    }

    @Test func aHintToCacheAllOfALargeDiskIsFollowedInPartAndAnswered() async throws {
        try await Self.withServer { place throws(BlockError) in
            let client = try await place.client(
                Self.extended + RawClient.go("disk")
                    + RawClient.extendedRequest(5, 0, UInt64(PatientDriver.size)))
            await place.pass(milliseconds: 10_000)
            let pieces = NBDRequestExecution.cacheBytesMax / NBDRequestExecution.prefetchBytesMax
            #expect(place.driver.requestCount == pieces)
            // Behind the handshake the reply to the request: done, without an error.
            let memory = try IOVector(allocating: 4_096)
            var received: [UInt8] = []
            while !received.suffix(32).starts(with: [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 0]) {
                let count = try await client.receive(memory)
                guard count > 0 else {
                    Issue.record("no reply came")
                    break
                }
                received += memory.array[..<count]
            }
            client.close()
        }
    }
}
