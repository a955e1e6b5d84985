import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFilters

/// Errors by rule, states and breakpoints.
@Suite struct BlockDebugTests {
    /// A raw node `top` above a blkdebug node `debug` above a disk that keeps nothing.
    private static func withDebug<T: Sendable>(
        _ options: JSONValue, _ simulation: Simulation = Simulation(seed: 1),
        _ body: @escaping @Sendable (SimulatedGraph, Edge) async throws(BlockError) -> T
    ) async throws -> T {
        try await SimulatedGraph.with(simulation) { setup throws(BlockError) in
            var object: JSONObject = [
                "driver": "blkdebug", "node-name": "debug", "image": ["driver": "null-co"],
                "discard": "unmap",
            ]
            if case .object(let more) = options {
                for (key, value) in more.members { object[key] = value }
            }
            try await setup.open(.object(object))
            try await setup.open(
                ["driver": "raw", "node-name": "top", "file": "debug", "discard": "unmap"])
            return try await body(setup, try setup.use("top"))
        }
    }

    /// Which of these requests fail, and with what: `r` reads, `w` writes, `z` zeroes, `d` discards,
    /// `s` asks for block status, at a sector.
    private static func outcomes(_ options: JSONValue, _ requests: String) async throws -> [Int32] {
        try await withDebug(options) { setup, edge throws(BlockError) in
            var result: [Int32] = []
            for request in requests.split(separator: " ") {
                let offset = (Int(request.dropFirst()) ?? 0) * 512
                let range = ByteRange(offset, 1024)
                do throws(BlockError) {
                    let data = try IOVector(allocating: range.count)
                    switch request.first {
                    case "r": try await edge.read(offset, into: data)
                    case "w": try await edge.write(offset, from: data)
                    case "z": try await edge.writeZeroes(range)
                    case "d": try await edge.discard(range)
                    default: _ = try await edge.blockStatus(range)
                    }
                    result.append(0)
                } catch { result.append(error.systemError) }
            }
            return result
        }
    }

    private static let tables: [(JSONValue, String, [Int32])] = [
        (["inject-error": [["event": "none"]]], "r0 w0 z0 d0 s0", [5, 5, 5, 5, 0]),
        (["inject-error": [["event": "none", "iotype": "block-status"]]], "r0 s0", [0, 5]),
        (
            ["inject-error": [["event": "none", "iotype": "write", "errno": 28]]], "r0 w0 z0",
            [0, 28, 0]
        ),
        (["inject-error": [["event": "none", "once": true]]], "w0 w0 r0", [5, 0, 0]),
        (["inject-error": [["event": "none", "errno": 0]]], "w0 r0", [0, 0]),
        // Two sectors each: the third is in the second and the third request.
        (["inject-error": [["event": "none", "sector": 2]]], "r0 r1 r2 r3", [0, 5, 5, 0]),
        (["inject-error": [["event": "write_aio", "immediately": true]]], "r0 w0 r0", [0, 5, 5]),
        // An event that arms errors disarms those of others.
        (
            [
                "inject-error": [
                    ["event": "write_aio", "errno": 28],
                    ["event": "read_aio", "iotype": "discard"],
                ]
            ], "w0 r0 w0 d0", [28, 0, 28, 28]
        ),
        (
            [
                "inject-error": [["event": "read_aio", "state": 2, "iotype": "read"]],
                "set-state": [
                    ["event": "write_aio", "state": 1, "new_state": 2],
                    ["event": "pwritev_zero", "new_state": 3],
                ],
            ], "r0 w0 r0 z0 r0", [0, 0, 5, 0, 5]
        ),
        (
            [
                "inject-error": [["event": "read_aio", "state": 2]],
                "set-state": [["event": "read_aio", "state": 1, "new_state": 2]],
            ], "r0 r0", [0, 5]
        ),
    ]

    @Test(arguments: tables.indices) func rulesDecideWhatFails(index: Int) async throws {
        let (options, requests, expected) = Self.tables[index]
        #expect(try await Self.outcomes(options, requests) == expected)
    }

    @Test func aConfigurationFileHasTheSameRules() async throws {
        let simulation = Simulation(seed: 1)
        simulation.disk.addFile(
            "/rules",
            bytes: Array(
                """
                # errors of the second state
                [inject-error]
                event = "read_aio"
                state = "2"
                \terrno = "28"

                [set-state "x"]
                event = "write_aio"
                new_state = "2"
                """.utf8))
        let codes = try await Self.withDebug(["config": "/rules"], simulation) {
            setup, edge throws(BlockError) in
            #expect(edge.node.driver.filename == "blkdebug:/rules:null-co://")
            var codes: [Int32] = []
            for _ in 0..<2 {
                do throws(BlockError) {
                    _ = try await setup.read(edge, 0, 512)
                    codes.append(0)
                } catch { codes.append(error.systemError) }
                try? await setup.write(edge, 0, 512, 1)
            }
            return codes
        }
        #expect(codes == [0, 28])
    }

    @Test(arguments: [
        "[inject-error]\nevent = \"foo\"", "[inject-error]\nerrno = \"5\"", "[foo]\nx = \"1\"",
        "[inject-error]\nevent = \"none\"\nbar = \"1\"", "[inject-error]\nevent = none",
        "event = \"none\"", "[set-state]\nevent = \"none\"", "[inject-error", "[inject-error]\nx",
        "[inject-error]\nevent = \"none\"\nstate = \"-1\"",
        "[inject-error]\nevent = \"none\"\nerrno = \"4294967296\"",
    ])
    func aBadConfigurationNamesItsPlace(text: String) throws {
        do {
            _ = try DebugConfiguration.parse(text, path: "rules")
            Issue.record("it was taken")
        } catch {
            #expect(error.message.contains("'rules', "), "\(error)")
        }
    }

    @Test(
        arguments: [
            ["align": 3], ["align": 4096, "max-transfer": 100],
            ["align": 4096, "opt-write-zero": 512],
            ["opt-write-zero": 8192, "max-write-zero": 4096], ["align": 512, "max-discard": 100],
            ["inject-error": [["event": "foo"]]], ["inject-error": [["errno": 1]]],
            ["take-child-perms": ["foo"]], ["config": "/none"], ["set-state": [["event": "none"]]],
        ] as [JSONValue])
    func badOptionsAreRefused(options: JSONValue) async throws {
        await #expect(throws: BlockError.self) {
            try await Self.withDebug(options) { _, _ throws(BlockError) in }
        }
    }

    @Test func zeroesAndDiscardsAreCutWhereTheLimitsSay() {
        let parts = DebugLimits.parts(ByteRange(1000, 20_000), unit: 4096, longest: 8192)
        #expect(
            parts == [
                ByteRange(1000, 3096), ByteRange(4096, 8192), ByteRange(12_288, 8192),
                ByteRange(20_480, 520),
            ])
        #expect(DebugLimits.parts(ByteRange(1, 9), unit: 0, longest: 0) == [ByteRange(1, 9)])
    }

    @Test func permissionsCanBeTakenAndDenied() async throws {
        let code = try await SimulatedGraph.with { setup throws(BlockError) in
            try await setup.open(["driver": "null-co", "node-name": "disk"])
            try await setup.open(
                [
                    "driver": "blkdebug", "node-name": "debug", "image": "disk",
                    "unshare-child-perms": ["write"],
                ])
            do throws(BlockError) {
                _ = try setup.use("disk")
                return BlockError.Code.busy
            } catch {
                return error.code
            }
        }
        #expect(code == .permissionDenied)
    }

    // MARK: Breakpoints

    /// What happened, in order.
    private final class Story: @unchecked Sendable {
        var lines: [String] = []
    }

    @Test func aBreakpointHoldsOneRequestUp() async throws {
        let story = try await Self.withDebug([:]) { setup, edge throws(BlockError) in
            let story = Story()
            guard let debug = BlockDebugFilter.nearest(to: edge.node) else { return story.lines }
            debug.setBreakpoint(at: .writeAIO, tag: "a") { story.lines.append($0) }
            let held: SimulatedGraph.Work = { () throws(BlockError) in
                try await setup.write(edge, 0, 512, 1)
                story.lines.append("written")
            }
            let other: SimulatedGraph.Work = { () throws(BlockError) in
                await debug.untilSuspended(tag: "a")
                try await setup.write(edge, 4096, 512, 1)
                story.lines.append("other")
                #expect(!debug.resume(tag: "b") && debug.resume(tag: "a"))
            }
            _ = await setup.together([held, other])
            return story.lines
        }
        #expect(
            story == [
                "blkdebug: Suspended request 'a'\n", "other", "blkdebug: Resuming request 'a'\n",
                "written",
            ])
    }

    @Test func aDrainLetsHeldRequestsGoOn() async throws {
        let lines = try await Self.withDebug([:]) { setup, edge throws(BlockError) in
            let story = Story()
            guard let debug = BlockDebugFilter.nearest(to: edge.node) else { return 0 }
            debug.setBreakpoint(at: .readAIO, tag: "a") { story.lines.append($0) }
            let held: SimulatedGraph.Work = { () throws(BlockError) in
                _ = try await setup.read(edge, 0, 512)
            }
            let drain: SimulatedGraph.Work = { () throws(BlockError) in
                await debug.untilSuspended(tag: "a")
                setup.graph.endDrain(await setup.graph.beginDrain([edge.node]))
            }
            _ = await setup.together([held, drain])
            return story.lines.count
        }
        #expect(lines == 2)
    }

    @Test func aRemovedBreakpointHoldsNothing() async throws {
        try await Self.withDebug([:]) { setup, edge throws(BlockError) in
            guard let debug = BlockDebugFilter.nearest(to: edge.node) else { return }
            debug.setBreakpoint(at: .readAIO, tag: "a") { _ in }
            #expect(debug.removeBreakpoints(tag: "a"))
            #expect(!debug.removeBreakpoints(tag: "a"))
            _ = try await setup.read(edge, 0, 512)
        }
    }
}
