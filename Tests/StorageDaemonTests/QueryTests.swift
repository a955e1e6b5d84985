import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// What the daemon tells of nodes and exports.
@Suite struct QueryTests {
    static let exported = DaemonTests.exported

    /// Has qemu-io carry out `commands` on the export.
    static func use(_ daemon: MonitoredDaemon, _ commands: String...) throws {
        let result = try ChildProgram.run(
            ["qemu-io", "-f", "raw"] + commands.flatMap { ["-c", $0] } + [
                "nbd+unix:///r?socket=\(daemon.folder)/nbd"
            ])
        try #require(result.status == 0, "\(result.errors)")
    }

    static func element(_ list: JSONValue, _ key: String, _ value: JSONValue) -> JSONValue? {
        guard case .array(let values) = list else { return nil }
        return values.first { $0[key] == value }
    }

    @Test func theWriteThresholdIsToldOnceAndThenForgotten() async throws {
        try await MonitoredDaemon.with(Self.exported) { daemon in
            let client = try daemon.client()
            func mark() throws -> JSONValue? {
                Self.element(
                    try client.execute("query-named-block-nodes"), "node-name", "f")?[
                        "write_threshold"]
            }
            try client.execute(
                "block-set-write-threshold", ["node-name": "f", "write-threshold": 8192])
            #expect(try mark() == 8192)
            try Self.use(daemon, "write 4k 4k", "discard 64k 64k")
            #expect(try mark() == 8192)
            try Self.use(daemon, "write 4k 8k", "write 4k 8k")
            let event = try client.event()
            #expect(event["event"] == "BLOCK_WRITE_THRESHOLD")
            #expect(
                event["data"] == [
                    "node-name": "f", "amount-exceeded": 4096, "write-threshold": 8192,
                ])
            #expect(try mark() == 0)
            #expect(client.events.isEmpty)
            let refused = try client.refusal(
                "block-set-write-threshold", ["node-name": "none", "write-threshold": 1])
            #expect(refused.contains("'none'"))
        }
    }

    @Test func statisticsCountRequestsBytesAndRefusals() async throws {
        try await MonitoredDaemon.with(Self.exported) { daemon in
            let client = try daemon.client()
            try Self.use(daemon, "write 4k 8k", "read 0 4k", "write -z 0 4k", "flush")
            let list = try client.execute("query-blockstats")
            let stats = try #require(Self.element(list, "device", "e")?["stats"])
            #expect(stats["wr_operations"] == 2)
            #expect(stats["wr_bytes"] == 12288)
            #expect(stats["rd_bytes"] == 4096)
            #expect(stats["wr_highest_offset"] == 12288)
            #expect(stats["failed_wr_operations"] == 0)
            #expect(stats["invalid_rd_operations"] == 0)
            #expect(stats["timed_stats"] == [])
            let nodes = try client.execute("query-blockstats", ["query-nodes": true])
            let raw = try #require(Self.element(nodes, "node-name", "r"))
            #expect(raw["stats"]?["wr_bytes"] == 12288)
            #expect(raw["parent"]?["node-name"] == "f")
            #expect(raw["parent"]?["driver-specific"]?["driver"] == "file")
            #expect(try client.execute("query-block") == [])
        }
    }

    @Test func latenciesAreCountedBetweenTheBoundariesThatAreAskedFor() async throws {
        try await MonitoredDaemon.with(Self.exported) { daemon in
            let client = try daemon.client()
            func histogram() throws -> JSONValue? {
                let list = try client.execute("query-blockstats")
                return Self.element(list, "device", "e")?["stats"]?["rd_latency_histogram"]
            }
            try client.execute(
                "block-latency-histogram-set",
                ["id": "e", "boundaries": [1_000_000, 3_600_000_000_000]])
            try Self.use(daemon, "read 0 4k", "read 0 4k")
            let counted = try histogram()
            #expect(counted?["boundaries"] == [1_000_000, 3_600_000_000_000])
            guard case .array(let bins)? = counted?["bins"] else {
                Issue.record("no bins")
                return
            }
            let numbers = bins.map { bin -> Int in
                if case .integer(let number) = bin { number } else { -1 }
            }
            #expect(numbers.count == 3)
            #expect(numbers.reduce(0, +) >= 2)
            #expect(numbers.last == 0)
            let refused = try client.refusal(
                "block-latency-histogram-set", ["id": "e", "boundaries-read": [5, 5]])
            #expect(refused.contains("ascending"))
            try client.execute("block-latency-histogram-set", ["id": "e"])
            #expect(try histogram()?["boundaries"] != [1_000_000, 3_600_000_000_000])
        }
    }

    @Test func nodesTellOfTheirBackingChainUnlessFlat() async throws {
        try await MonitoredDaemon.with { daemon in
            for arguments in [
                ["-f", "qcow2", "\(daemon.folder)/base", "1M"],
                ["-f", "qcow2", "-b", "base", "-F", "qcow2", "\(daemon.folder)/top"],
            ] {
                let result = try ChildProgram.run(["qemu-img", "create", "-q"] + arguments)
                try #require(result.status == 0, "\(result.errors)")
            }
            let client = try daemon.client()
            let folder = daemon.folder
            try client.execute(
                "blockdev-add",
                [
                    "driver": "qcow2", "node-name": "t",
                    "file": ["driver": "file", "filename": .string("\(folder)/top")],
                ])
            let deep = try #require(
                Self.element(try client.execute("query-named-block-nodes"), "node-name", "t"))
            #expect(deep["backing_file_depth"] == 1)
            let image = try #require(deep["image"])
            #expect(image["backing-filename"] == "base")
            #expect(image["full-backing-filename"] == .string("\(folder)/base"))
            #expect(image["backing-filename-format"] == "qcow2")
            #expect(image["backing-image"]?["filename"] == .string("\(folder)/base"))
            #expect(image["backing-image"]?["virtual-size"] == 1_048_576)
            let flat = try #require(
                Self.element(
                    try client.execute("query-named-block-nodes", ["flat": true]), "node-name", "t")
            )
            #expect(flat["image"]?["backing-image"] == nil)
            #expect(flat["backing_file_depth"] == 0)
        }
    }

    @Test func traceEventsAreSwitchedByPatterns() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            func state() throws -> JSONValue? {
                Self.element(
                    try client.execute("trace-event-get-state", ["name": "cbw_*"]), "name",
                    "cbw_copy")?["state"]
            }
            #expect(try state() == "disabled")
            try client.execute("trace-event-set-state", ["name": "cbw_*", "enable": true])
            #expect(try state() == "enabled")
            try client.execute("trace-event-set-state", ["name": "cbw_copy", "enable": false])
            #expect(try state() == "disabled")
            let unknown = try client.refusal(
                "trace-event-set-state", ["name": "cbw_copies", "enable": true])
            #expect(unknown.contains("cbw_copy"))
        }
    }
}
