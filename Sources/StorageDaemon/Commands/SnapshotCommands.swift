import BlockCore
import BlockGraph
import QMP

// Snapshots inside images.

extension StorageDaemon {
    /// `blockdev-snapshot-internal-sync`.
    func snapshotInternal(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-snapshot-internal-sync")
        let device = try reader.required("device")
        try await holdingUsers(of: Self.node(named: device)) { _ throws(BlockError) in
            _ = try await createInternalSnapshot(arguments)
        }
        return [:]
    }

    private static func node(named name: String) -> (BlockGraph) -> [BlockNode] {
        { graph in graph.node(named: name).map { [$0] } ?? [] }
    }

    /// Makes a snapshot, as the command and the transaction's action do.
    func createInternalSnapshot(
        _ arguments: JSONValue
    ) async throws(BlockError) -> (node: BlockNode, snapshot: InternalSnapshot) {
        let reader = try OptionReader(arguments, of: "blockdev-snapshot-internal-sync")
        let device = try reader.required("device")
        let name = try reader.required("name")
        try reader.finish()
        guard !name.isEmpty else {
            throw BlockError(.invalidArgument, "a snapshot's name cannot be empty")
        }
        return try await onThread(of: device) { node throws(BlockError) in
            let known = try node.requireSnapshotStore().snapshot(SnapshotSelector(name: name))
            guard known == nil else {
                throw BlockError(
                    .alreadyExists, "there is a snapshot '\(name)' already", node: node.name)
            }
            return (node, try await node.graph.createSnapshot(name, of: node, at: .now))
        }
    }

    /// `blockdev-snapshot-delete-internal-sync`.
    func snapshotDeleteInternal(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-snapshot-delete-internal-sync")
        let device = try reader.required("device")
        let selector = SnapshotSelector(
            identifier: try reader.string("id"), name: try reader.string("name"))
        try reader.finish()
        guard selector.identifier != nil || selector.name != nil else {
            throw BlockError(.invalidArgument, "give 'id' or 'name'")
        }
        return try await holdingUsers(of: Self.node(named: device)) { _ throws(BlockError) in
            try await onThread(of: device) { node throws(BlockError) in
                guard let snapshot = try node.requireSnapshotStore().snapshot(selector) else {
                    throw BlockError(
                        .notFound, "there is no snapshot \(selector.text)", node: node.name)
                }
                try await node.graph.deleteSnapshot(snapshot.identifier, of: node)
                return snapshot.json
            }
        }
    }
}
