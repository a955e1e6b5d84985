import BlockCore
import BlockFilters
import BlockGraph
import BlockProtocols
import QMP

// What nodes and exports were asked to do, and how long it took.

extension StorageDaemon {
    /// `query-blockstats`: of exports, each under its identifier; or with `query-nodes` of all nodes.
    func queryBlockstats(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "query-blockstats")
        let wantsNodes = try reader.bool("query-nodes") ?? false
        try reader.finish()
        if wantsNodes {
            var result: [JSONValue] = []
            try await onEachThread { graph in
                result += graph.nodes.filter(\.isReady).map { node in
                    .object(describe(node, Self.total(of: node), chain: false, nesting: 0))
                }
            }
            return .array(result)
        }
        var result: [JSONValue] = []
        for record in exports {
            let export = record.export
            try await export.seat.visit { () throws(BlockError) in
                guard let edge = export.edge else { return }
                var entry = describe(edge.node, edge.statistics, chain: true, nesting: 0)
                entry["device"] = .string(record.identifier)
                result.append(.object(entry))
            }
        }
        return .array(result)
    }

    /// What all users together did with a node.
    private static func total(of node: BlockNode) -> RequestStatistics {
        var total = RequestStatistics()
        for edge in node.parents { total.add(edge.statistics) }
        return total
    }

    /// - Parameter chain: with backing images, not the storage below alone.
    private func describe(
        _ node: BlockNode, _ statistics: RequestStatistics, chain: Bool, nesting: Int
    ) -> JSONObject {
        var result: JSONObject = [
            "node-name": .string(node.name), "stats": describe(statistics, node),
        ]
        if let specific = Self.driverSpecific(node) { result["driver-specific"] = specific }
        guard nesting < Limits.graphDepthMax else { return result }
        if let file = node.file?.node {
            result["parent"] = .object(
                describe(file, Self.total(of: file), chain: chain, nesting: nesting + 1))
        }
        if chain, let backing = node.backing?.node {
            result["backing"] = .object(
                describe(backing, Self.total(of: backing), chain: chain, nesting: nesting + 1))
        }
        return result
    }

    private static func driverSpecific(_ node: BlockNode) -> JSONValue? {
        if let file = node.driver as? FileDriver {
            return [
                "driver": .string(node.description.name),
                "discard-nb-ok": .integer(file.discards.successes),
                "discard-nb-failed": .integer(file.discards.failures),
                "discard-bytes-ok": .integer(file.discards.bytes),
            ]
        }
        if let filter = node.driver as? CopyBeforeWrite {
            var result: JSONObject = [
                "driver": "copy-before-write", "copied-bytes": .integer(filter.copiedBytes),
                "present-bytes": .integer(filter.presentBytes),
            ]
            if let breakage = filter.breakage { result["broken"] = .string(breakage.message) }
            return .object(result)
        }
        return nil
    }

    /// Requests are not merged here, zones not appended to, and no intervals averaged over: those
    /// numbers stay 0, as clients expect to find them.
    private func describe(_ statistics: RequestStatistics, _ node: BlockNode) -> JSONValue {
        var result: JSONObject = [
            "rd_merged": 0, "wr_merged": 0, "unmap_merged": 0, "zone_append_merged": 0,
            "zone_append_bytes": 0, "zone_append_operations": 0, "zone_append_total_time_ns": 0,
            "failed_zone_append_operations": 0, "invalid_zone_append_operations": 0,
            "account_invalid": true, "account_failed": true, "timed_stats": [],
        ]
        let kinds: [(RequestKind, String)] = [
            (.read, "rd"), (.write, "wr"), (.discard, "unmap"), (.flush, "flush"),
        ]
        for (kind, name) in kinds {
            let counter = statistics[kind]
            // Zeroing is a way of writing.
            let zeroes = kind == .write ? statistics[.writeZeroes] : .init()
            func sum(_ part: (RequestStatistics.Counter) -> UInt64) -> JSONValue {
                .integer(Int(clamping: part(counter) &+ part(zeroes)))
            }
            result["\(name)_operations"] = sum(\.requests)
            result["\(name)_total_time_ns"] = sum(\.nanoseconds)
            result["failed_\(name)_operations"] = sum(\.failures)
            result["invalid_\(name)_operations"] = sum(\.refusals)
            if kind != .flush { result["\(name)_bytes"] = sum(\.bytes) }
            result["\(name)_latency_histogram"] = Self.describe(counter.latencies)
        }
        result["wr_highest_offset"] = .integer(node.highestWrittenOffset)
        if let use = statistics.lastUse {
            result["idle_time_ns"] = .integer(Int(clamping: node.thread.now &- use))
        }
        return .object(result)
    }

    /// Boundaries in nanoseconds, then one more bin than boundaries.
    private static func describe(_ latencies: LatencyHistogram) -> JSONValue {
        [
            "boundaries": .array(latencies.boundaries.map { .integer(Int(clamping: $0)) }),
            "bins": .array(latencies.counts.map { .integer(Int(clamping: $0)) }),
        ]
    }

    // MARK: Settings

    /// `block-latency-histogram-set`: other boundaries for an export; none for the usual ones.
    func setLatencyHistogram(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "block-latency-histogram-set")
        let record = try requireExport(try reader.required("id"))
        let all = try boundaries(reader, "boundaries")
        var wanted: [(RequestKind, [UInt64]?)] = []
        let kinds: [(String, RequestKind)] = [
            ("boundaries-read", .read), ("boundaries-write", .write), ("boundaries-flush", .flush),
        ]
        for (name, kind) in kinds {
            wanted.append((kind, try boundaries(reader, name) ?? all))
        }
        wanted.append((.discard, all))
        // Of appends to zones, which no export here has.
        _ = try boundaries(reader, "boundaries-zap")
        try reader.finish()
        let isReset = wanted.allSatisfy { $0.1 == nil }
        let export = record.export
        try await export.seat.visit { () throws(BlockError) in
            guard let edge = export.edge else {
                throw BlockError(.busy, "export '\(record.identifier)' is going away")
            }
            for (kind, boundaries) in wanted where isReset || boundaries != nil {
                edge.statistics.setBoundaries(boundaries, of: kind)
            }
        }
        return [:]
    }

    private func boundaries(
        _ reader: OptionReader, _ name: String
    ) throws(BlockError) -> [UInt64]? {
        guard let list = try reader.list(name) else { return nil }
        var result: [UInt64] = []
        for value in list {
            guard case .integer(let number) = value, number > 0,
                result.last.map({ $0 < UInt64(number) }) ?? true
            else {
                throw BlockError(
                    .invalidArgument,
                    "'\(name)' must hold ascending numbers of nanoseconds, all above zero")
            }
            result.append(UInt64(number))
        }
        guard !result.isEmpty, result.count <= Self.boundaryCountMax else {
            throw BlockError(
                .invalidArgument, "'\(name)' must hold 1 to \(Self.boundaryCountMax) boundaries")
        }
        return result
    }

    /// Each request looks through them.
    static let boundaryCountMax = 256

    /// `block-set-write-threshold`: tells once when a node is written past a mark; 0 for never.
    func setWriteThreshold(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "block-set-write-threshold")
        let name = try reader.required("node-name")
        guard let offset = try reader.int("write-threshold"), offset >= 0 else {
            throw BlockError(
                .invalidArgument, "'write-threshold' is missing or out of bounds")
        }
        try reader.finish()
        try await onThread(of: name) { node in
            node.setWriteThreshold(offset == 0 ? nil : offset) { [weak self] bytes in
                self?.post(
                    "BLOCK_WRITE_THRESHOLD",
                    [
                        "node-name": .string(name), "amount-exceeded": .integer(bytes),
                        "write-threshold": .integer(offset),
                    ])
            }
        }
        return [:]
    }

    // MARK: Table

    static let statisticsCommands = [
        DaemonCommand(
            CommandSchema(
                "query-blockstats", .optional("query-nodes", .boolean), result: .array(.any)),
            StorageDaemon.queryBlockstats),
        DaemonCommand(
            CommandSchema(
                "block-latency-histogram-set", .required("id", .string),
                .optional("boundaries", .array(.integer)),
                .optional("boundaries-read", .array(.integer)),
                .optional("boundaries-write", .array(.integer)),
                .optional("boundaries-zap", .array(.integer)),
                .optional("boundaries-flush", .array(.integer))),
            StorageDaemon.setLatencyHistogram),
        DaemonCommand(
            CommandSchema(
                "block-set-write-threshold", .required("node-name", .string),
                .required("write-threshold", .integer)),
            StorageDaemon.setWriteThreshold),
    ]
}
