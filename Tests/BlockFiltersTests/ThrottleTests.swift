import BlockCore
import BlockFilters
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// Throttle groups on a clock that runs only while everybody waits: what they hold back is exact.
@Suite struct ThrottleTests {
    /// Nodes `a`, `b`… of one group above disks that keep nothing.
    private static func withGroup<T: Sendable>(
        _ limits: JSONValue, nodes: [String] = ["a"],
        _ body:
            @escaping @Sendable (SimulatedGraph, ThrottleGroup, [Edge]) async throws(BlockError)
            -> T
    ) async throws -> T {
        try await SimulatedGraph.with { setup throws(BlockError) in
            var parsed = ThrottleLimits()
            try parsed.take(try OptionReader(limits, of: "limits"))
            let group = try ThrottleGroup("group", parsed, on: setup.thread)
            try setup.graph.addObject(group, as: "group")
            var edges: [Edge] = []
            for name in nodes {
                try await setup.open(
                    [
                        "driver": "throttle", "node-name": .string(name),
                        "throttle-group": "group", "file": ["driver": "null-co"],
                        "discard": "unmap",
                    ])
                edges.append(try setup.use(name))
            }
            return try await body(setup, group, edges)
        }
    }

    private enum Request: Sendable { case read, write, zero, discard, flush }

    /// Seconds that `count` requests at once take, of `bytes` each.
    private static func seconds(
        _ limits: JSONValue, count: Int, bytes: Int, _ kind: Request = .write
    ) async throws -> Double {
        try await withGroup(limits) { setup, _, edges throws(BlockError) in
            let start = setup.thread.now
            let data = try IOVector(allocating: bytes)
            let edge = edges[0]
            let request: @Sendable () async throws(BlockError) -> Void = {
                () throws(BlockError) in
                switch kind {
                case .read: try await edge.read(0, into: data)
                case .write: try await edge.write(0, from: data)
                case .zero: try await edge.writeZeroes(ByteRange(0, bytes))
                case .discard: try await edge.discard(ByteRange(0, bytes))
                case .flush: try await edge.flush()
                }
            }
            let errors = await setup.together(Array(repeating: request, count: count))
            if let error = errors.first { throw error }
            return Double(setup.thread.now - start) / 1e9
        }
    }

    @Test func theAverageIsKept() async throws {
        // 4 MiB at 1 MiB a second; a tenth of a second's worth goes at once, the last one need not end.
        let bytes = try await Self.seconds(["bps-total": 1_048_576], count: 64, bytes: 65536)
        #expect(bytes > 3.8 && bytes < 4.0)
        let operations = try await Self.seconds(["iops-write": 10], count: 41, bytes: 512)
        #expect(operations > 3.8 && operations < 4.0)
    }

    @Test func aBurstGoesFasterForItsTime() async throws {
        let limits: JSONValue = ["iops-total": 10, "iops-total-max": 100]
        let burst = try await Self.seconds(limits, count: 101, bytes: 512)
        #expect(burst < 0.001)
        let longer = try await Self.seconds(limits, count: 121, bytes: 512)
        #expect(longer > 1.8 && longer < 2.1)
        // Three seconds at a hundred, then ten a second.
        var long = limits
        if case .object(var object) = long {
            object["iops-total-max-length"] = 3
            long = .object(object)
        }
        let first = try await Self.seconds(long, count: 250, bytes: 512)
        #expect(first > 2.3 && first < 2.5)
        let all = try await Self.seconds(long, count: 400, bytes: 512)
        #expect(all > 7 && all < 14)
    }

    @Test func aLargeRequestCountsAsSeveralOperations() async throws {
        let limits: JSONValue = ["iops-total": 10, "iops-size": 4096]
        let seconds = try await Self.seconds(limits, count: 5, bytes: 40960)
        #expect(seconds > 3.8 && seconds < 4.0)
        let small = try await Self.seconds(limits, count: 5, bytes: 4096)
        #expect(small < 0.5)
    }

    @Test func limitsOfOneDirectionLeaveTheOtherAlone() async throws {
        let reads = try await Self.seconds(["iops-write": 1], count: 50, bytes: 512, .read)
        #expect(reads < 0.001)
        for kind in [Request.zero, .discard] {
            let writes = try await Self.seconds(["bps-write": 4096], count: 3, bytes: 4096, kind)
            #expect(writes > 1.8 && writes < 2.1)
        }
        let flushes = try await Self.seconds(["iops-total": 1], count: 20, bytes: 512, .flush)
        #expect(flushes < 0.001)
    }

    /// Whose writes came through, in order.
    private final class Order: @unchecked Sendable {
        var names: [String] = []

        func write(
            _ setup: SimulatedGraph, _ edge: Edge
        ) -> @Sendable () async throws(BlockError) -> Void {
            { () throws(BlockError) in
                try await setup.write(edge, 0, 512, 1)
                self.names.append(edge.node.name)
            }
        }
    }

    @Test func membersTakeTurnsHoweverManyTheirRequests() async throws {
        let order = try await Self.withGroup(["iops-total": 10], nodes: ["a", "b", "c"]) {
            setup, _, edges throws(BlockError) in
            let order = Order()
            var bodies: [@Sendable () async throws(BlockError) -> Void] = []
            for (index, count) in [40, 5, 5].enumerated() {
                bodies += Array(repeating: order.write(setup, edges[index]), count: count)
            }
            let errors = await setup.together(bodies)
            if let error = errors.first { throw error }
            return order.names
        }
        #expect(order.count == 50)
        // The first few of `a` go before the others come.
        let last = ["b", "c"].map { name in order.lastIndex(of: name) ?? 50 }.max() ?? 50
        #expect(last < 20, "\(order)")
    }

    @Test func allMembersTogetherKeepTheLimit() async throws {
        let seconds = try await Self.withGroup(["iops-total": 10], nodes: ["a", "b"]) {
            setup, _, edges throws(BlockError) in
            let start = setup.thread.now
            _ = await setup.together(
                setup.writes(edges[0], count: 20) + setup.writes(edges[1], count: 20))
            return Double(setup.thread.now - start) / 1e9
        }
        #expect(seconds > 3.7 && seconds < 4.0)
    }

    @Test func aDrainLetsWaitingRequestsThrough() async throws {
        let seconds = try await Self.withGroup(["iops-total": 1], nodes: ["a", "b"]) {
            setup, _, edges throws(BlockError) in
            let start = setup.thread.now
            let drain: SimulatedGraph.Work = { () throws(BlockError) in
                let section = await setup.graph.beginDrain(edges.map(\.node))
                setup.graph.endDrain(section)
            }
            _ = await setup.together(
                setup.writes(edges[0], count: 50) + setup.writes(edges[1], count: 50) + [drain])
            return Double(setup.thread.now - start) / 1e9
        }
        #expect(seconds < 0.001)
    }

    @Test func aUserThatLeavesIsNotHeldBack() async throws {
        let seconds = try await Self.withGroup(["iops-total": 1], nodes: ["a", "b"]) {
            setup, group, edges throws(BlockError) in
            let start = setup.thread.now
            let leave: SimulatedGraph.Work = { () throws(BlockError) in
                try await setup.leave(edges[0])
            }
            _ = await setup.together(setup.writes(edges[0], count: 20) + [leave])
            try await setup.graph.remove(try setup.graph.requireNode(named: "a"))
            #expect(group.users == ["node 'b'"])
            return Double(setup.thread.now - start) / 1e9
        }
        #expect(seconds < 0.001)
    }

    @Test func otherLimitsHoldForRequestsThatWaitAlready() async throws {
        let seconds = try await Self.withGroup(["iops-total": 1]) {
            setup, group, edges throws(BlockError) in
            let start = setup.thread.now
            let change: SimulatedGraph.Work = { () throws(BlockError) in
                try group.setLimits(ThrottleLimits())
            }
            _ = await setup.together(setup.writes(edges[0], count: 100) + [change])
            return Double(setup.thread.now - start) / 1e9
        }
        #expect(seconds < 0.001)
    }

    @Test func aGroupInUseStays() async throws {
        try await Self.withGroup(["iops-total": 1]) { setup, _, edges throws(BlockError) in
            do throws(BlockError) {
                try setup.graph.removeObject("group")
                Issue.record("the group went away under its node")
            } catch {
                #expect(error.code == .busy && error.message.contains("'a'"))
            }
            try await setup.leave(edges[0])
            try await setup.graph.remove(try setup.graph.requireNode(named: "a"))
            try setup.graph.removeObject("group")
        }
    }

    @Test(
        arguments: [
            ["bps-total": 1, "bps-read": 1], ["iops-total": 1, "iops-write": 1],
            ["bps-read-max": 1],
            ["bps-read": 10, "bps-read-max": 9], ["bps-read": 1, "bps-read-max-length": 2],
            ["iops-size": 1], ["iops-total": 1_000_000_000_000_001], ["bps-read-max-length": 0],
            ["bps-read": 1, "bps-read-max": 1_000_000_000_000_000, "bps-read-max-length": 2],
            ["bps-total-max-length": 4_294_967_296], ["bps-total": -1],
        ] as [[String: Int]])
    func limitsThatContradictEachOtherAreRefused(options: [String: Int]) {
        #expect(throws: BlockError.self) {
            var limits = ThrottleLimits()
            var object = JSONObject()
            for (key, value) in options { object[key] = .integer(value) }
            try limits.take(try OptionReader(.object(object), of: "limits"))
            try limits.validate()
        }
    }

    @Test func aNodeNeedsAGroupThatIsThere() async throws {
        for options in [["driver": "throttle"], ["driver": "throttle", "throttle-group": "none"]]
            as [JSONValue]
        {
            await #expect(throws: BlockError.self) {
                try await SimulatedGraph.with { setup throws(BlockError) in
                    guard case .object(var object) = options else { return }
                    object["file"] = ["driver": "null-co"]
                    object["node-name"] = "a"
                    try await setup.open(.object(object))
                }
            }
        }
    }
}
