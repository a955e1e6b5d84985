import BlockCore
import BlockExports
import BlockGraph
import BlockProtocols
import QMP

extension StorageDaemon {
    /// `query-block`: guest devices. There are none here, as in QEMU's own storage daemon: nodes are told
    /// of by `query-named-block-nodes`, exports by `query-block-exports`.
    func queryBlock(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        []
    }

    /// `query-named-block-nodes`.
    func queryNamedBlockNodes(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "query-named-block-nodes")
        let flat = try reader.bool("flat") ?? false
        try reader.finish()
        var result: [JSONValue] = []
        try await onEachThread { graph throws(BlockError) in
            for node in graph.nodes where node.isReady {
                result.append(try await describe(node, flat: flat))
            }
        }
        return .array(result)
    }

    private func describe(_ node: BlockNode, flat: Bool) async throws(BlockError) -> JSONValue {
        var result: JSONObject = [
            "iops_rd": 0, "detect_zeroes": .string(node.options.zeroDetection.rawValue),
            "active": true,
            "image": try await image(of: node, nesting: flat ? 0 : Limits.graphDepthMax),
            "iops_wr": 0, "ro": .bool(node.isReadOnly), "node-name": .string(node.name),
            "backing_file_depth": .integer(flat ? 0 : Self.backingDepth(of: node)),
            "drv": .string(node.description.name), "iops": 0, "bps_wr": 0,
            "write_threshold": .integer(node.writeThreshold ?? 0),
            "encrypted": false, "bps": 0, "bps_rd": 0,
            "cache": [
                "no-flush": .bool(node.options.ignoresFlush),
                "direct": .bool(node.options.isDirect), "writeback": true,
            ],
            "file": .string(node.driver.filename),
            "children": .array(
                node.children.map { edge in
                    ["node-name": .string(edge.node.name), "child": .string(edge.name)]
                }),
        ]
        if let backing = node.backing {
            result["backing_file"] = .string(backing.node.driver.filename)
        }
        if !node.dirtyBitmaps.isEmpty {
            for bitmap in node.dirtyBitmaps { await bitmap.load() }
            result["dirty-bitmaps"] = .array(node.dirtyBitmaps.map(\.description))
        }
        return .object(result)
    }

    private static func backingDepth(of node: BlockNode) -> Int {
        var depth = 0
        var layer = node
        while let backing = layer.backing?.node, depth < Limits.graphDepthMax {
            depth += 1
            layer = backing
        }
        return depth
    }

    /// Image information, as `qemu-img info` tells it too.
    ///
    /// - Parameter nesting: how many backing images are described inside each other.
    private func image(
        of node: BlockNode, nesting: Int
    ) async throws(BlockError) -> JSONValue {
        let information = try await node.driver.information
        let filename = node.driver.filename
        var result: JSONObject = [
            "virtual-size": .integer(node.size), "filename": .string(filename),
            "format": .string(node.description.name), "dirty-flag": .bool(information.isDirty),
        ]
        var storage = node
        while let file = storage.file { storage = file.node }
        if let file = storage.driver as? FileDriver {
            result["actual-size"] = .integer(try await file.allocatedBytes())
        }
        if information.clusterSize > 0 {
            result["cluster-size"] = .integer(information.clusterSize)
        }
        if let snapshots = node.driver.snapshotStore?.internalSnapshots, !snapshots.isEmpty {
            result["snapshots"] = .array(snapshots.map(\.json))
        }
        if let specific = information.formatSpecific { result["format-specific"] = specific }
        let backing = node.backing?.node
        if let name = information.backingName {
            result["backing-filename"] = .string(name)
            result["full-backing-filename"] = .string(Self.resolve(name, beside: filename))
            if let format = information.backingFormat {
                result["backing-filename-format"] = .string(format)
            }
        } else if let backing {
            result["backing-filename"] = .string(backing.driver.filename)
        }
        if let backing, nesting > 0 {
            result["backing-image"] = try await image(of: backing, nesting: nesting - 1)
        }
        return .object(result)
    }

    /// A backing file's name as the image has it is relative to the image's folder.
    private static func resolve(_ name: String, beside image: String) -> String {
        guard !name.hasPrefix("/"), !name.contains(":"), !image.hasPrefix("json:"),
            let slash = image.lastIndex(of: "/")
        else { return name }
        return image[...slash] + name
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
            let export = record.export
            try await export.seat.visit { () throws(BlockError) in
                guard let edge = export.edge else { return }
                add(edge, parent: add(record, "block-backend", record.identifier))
            }
        }
        try await onEachThread { graph in
            for node in graph.nodes {
                let identifier = add(node, "block-driver", node.name)
                for edge in node.children { add(edge, parent: identifier) }
            }
        }
        return ["nodes": .array(nodes), "edges": .array(edges)]
    }
}
