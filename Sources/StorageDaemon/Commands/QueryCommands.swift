import BlockCore
import BlockExports
import BlockFilters
import BlockGraph
import BlockProtocols
import QMP

extension StorageDaemon {
    /// `query-block`: guest devices; this daemon has none.
    func queryBlock(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        []
    }

    /// `query-named-block-nodes`.
    func queryNamedBlockNodes(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "query-named-block-nodes")
        let flat = try reader.bool("flat") ?? false
        try reader.finish()
        var result: [JSONValue] = []
        for node in graph.nodes where node.isReady {
            result.append(try await describe(node, flat: flat))
        }
        return .array(result)
    }

    private func describe(_ node: BlockNode, flat: Bool) async throws(BlockError) -> JSONValue {
        var backingDepth = 0
        var layer = node
        while let backing = layer.backing?.node, backingDepth < Limits.graphDepthMax {
            backingDepth += 1
            layer = backing
        }
        let filename = node.driver.filename
        var result: JSONObject = [
            "iops_rd": 0, "detect_zeroes": .string(node.options.zeroDetection.rawValue),
            "active": true,
            "image": try await image(of: node, flat: flat), "iops_wr": 0,
            "ro": .bool(node.isReadOnly), "node-name": .string(node.name),
            "backing_file_depth": .integer(backingDepth),
            "drv": .string(node.description.name), "iops": 0, "bps_wr": 0, "write_threshold": 0,
            "encrypted": false, "bps": 0, "bps_rd": 0,
            "cache": [
                "no-flush": .bool(node.options.ignoresFlush),
                "direct": .bool(node.options.isDirect), "writeback": true,
            ],
            "file": .string(filename),
            "children": .array(
                node.children.map { edge in
                    ["node-name": .string(edge.node.name), "child": .string(edge.name)]
                }),
        ]
        if let backing = node.backing {
            result["backing_file"] = .string(backing.node.driver.filename)
        }
        if !node.dirtyBitmaps.isEmpty {
            result["dirty-bitmaps"] = .array(node.dirtyBitmaps.map(\.description))
        }
        return .object(result)
    }

    private func image(of node: BlockNode, flat: Bool) async throws(BlockError) -> JSONValue {
        let information = try await node.driver.information
        var result: JSONObject = [
            "virtual-size": .integer(node.size), "filename": .string(node.driver.filename),
            "format": .string(node.description.name),
        ]
        var storage = node
        while let file = storage.file { storage = file.node }
        if let file = storage.driver as? FileDriver {
            result["actual-size"] = .integer(try await file.allocatedBytes())
        }
        if information.clusterSize > 0 {
            result["cluster-size"] = .integer(information.clusterSize)
        }
        if information.isDirty { result["dirty-flag"] = true }
        if let snapshots = node.driver.snapshotStore?.internalSnapshots, !snapshots.isEmpty {
            result["snapshots"] = .array(snapshots.map(\.json))
        }
        if let specific = information.formatSpecific { result["format-specific"] = specific }
        if let backing = node.backing?.node {
            result["backing-filename"] = .string(backing.driver.filename)
            if !flat { result["backing-image"] = try await image(of: backing, flat: false) }
        }
        return .object(result)
    }

    /// `query-blockstats`: of exports, or with `query-nodes` of all nodes.
    func queryBlockstats(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "query-blockstats")
        let wantsNodes = try reader.bool("query-nodes") ?? false
        try reader.finish()
        guard wantsNodes else {
            return .array(
                exports.compactMap { record in
                    guard let edge = record.export.edge else { return nil }
                    return [
                        "device": .string(record.identifier), "node-name": .string(edge.node.name),
                        "stats": Self.statistics(edge.statistics, edge.node),
                    ]
                })
        }
        return .array(
            graph.nodes.filter(\.isReady).map { node in
                var total = RequestStatistics()
                for edge in node.parents { total.add(edge.statistics) }
                var result: JSONObject = [
                    "node-name": .string(node.name), "stats": Self.statistics(total, node),
                ]
                if let filter = node.driver as? CopyBeforeWrite {
                    result["driver-specific"] = Self.describe(filter)
                }
                return .object(result)
            })
    }

    private static func describe(_ filter: CopyBeforeWrite) -> JSONValue {
        var result: JSONObject = [
            "driver": "copy-before-write", "copied-bytes": .integer(filter.copiedBytes),
            "present-bytes": .integer(filter.presentBytes),
        ]
        if let breakage = filter.breakage { result["broken"] = .string(breakage.message) }
        return .object(result)
    }

    private static func statistics(_ statistics: RequestStatistics, _ node: BlockNode) -> JSONValue
    {
        var result: JSONObject = [:]
        let kinds: [(RequestKind, String)] = [
            (.read, "rd"), (.write, "wr"), (.discard, "unmap"), (.flush, "flush"),
        ]
        for (kind, name) in kinds {
            let counter = statistics[kind]
            result["\(name)_operations"] = .integer(Int(clamping: counter.requests))
            result["\(name)_total_time_ns"] = .integer(Int(clamping: counter.nanoseconds))
            result["failed_\(name)_operations"] = .integer(Int(clamping: counter.failures))
            if kind != .flush { result["\(name)_bytes"] = .integer(Int(clamping: counter.bytes)) }
            result["\(name)_latency_histogram"] = histogram(counter.latencies)
        }
        result["wr_highest_offset"] = .integer(node.highestWrittenOffset)
        return .object(result)
    }

    /// Boundaries in nanoseconds, then one more bin than boundaries.
    private static func histogram(_ latencies: LatencyHistogram) -> JSONValue {
        [
            "boundaries": .array(
                (0..<(LatencyHistogram.bucketCount - 1)).map { .integer(1000 << $0) }),
            "bins": .array(latencies.counts.map { .integer(Int(clamping: $0)) }),
        ]
    }

    /// `x-debug-query-block-graph`.
    func queryBlockGraph(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        var identifiers: [ObjectIdentifier: Int] = [:]
        var nodes: [JSONValue] = []
        func add(_ object: AnyObject, _ type: String, _ name: String) -> Int {
            if let known = identifiers[ObjectIdentifier(object)] { return known }
            let identifier = identifiers.count + 1
            identifiers[ObjectIdentifier(object)] = identifier
            nodes.append(["id": .integer(identifier), "type": .string(type), "name": .string(name)])
            return identifier
        }
        var edges: [JSONValue] = []
        func add(_ edge: Edge, parent: Int) {
            let child = add(edge.node, "block-driver", edge.node.name)
            edges.append([
                "parent": .integer(parent), "child": .integer(child), "name": .string(edge.name),
                "perm": .array(edge.access.uses.names.map { .string($0) }),
                "shared-perm": .array(edge.access.shares.names.map { .string($0) }),
            ])
        }
        for record in exports {
            guard let edge = record.export.edge else { continue }
            add(edge, parent: add(record, "block-backend", record.identifier))
        }
        for node in graph.nodes {
            let identifier = add(node, "block-driver", node.name)
            for edge in node.children { add(edge, parent: identifier) }
        }
        return ["nodes": .array(nodes), "edges": .array(edges)]
    }
}
