import BlockCore
import BlockGraph
import QMP

/// The two ends of a fleecing graph over two files, `disk` and `temp`, of a folder:
///
///     guest ──► cbw ──file──► disk          backup ──► snap ──file──► cbw
///                └──target──► temp
///
/// The graph's registry has the drivers; closing it closes all of this.
public struct FleecingEnds: Sendable {
    /// Writes the live disk.
    public let guest: Edge
    /// Reads and discards the frozen one.
    public let snapshot: Edge

    /// - Parameter options: of the copy-before-write node, beside its children.
    public init(
        in graph: BlockGraph, folder: String, options: JSONValue = [:]
    ) async throws(BlockError) {
        for name in ["disk", "temp"] {
            _ = try await graph.open(
                [
                    "driver": "raw", "node-name": .string(name), "discard": "unmap",
                    "file": ["driver": "file", "filename": .string("\(folder)/\(name)")],
                ], monitorOwned: true)
        }
        var filter: JSONObject = [
            "driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp",
            "discard": "unmap",
        ]
        if case .object(let more) = options {
            for (key, value) in more.members { filter[key] = value }
        }
        let cbw = try await graph.open(.object(filter), monitorOwned: true)
        let access = try await graph.open(
            ["driver": "snapshot-access", "node-name": "snap", "file": "cbw", "discard": "unmap"],
            monitorOwned: true)
        let use = Access(uses: [.consistentRead, .write], shares: .all)
        guest = try graph.attach(NamedUser("guest"), to: cbw, use)
        snapshot = try graph.attach(NamedUser("backup"), to: access, use)
    }
}
