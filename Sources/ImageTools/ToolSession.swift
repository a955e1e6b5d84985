import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import QMP

/// A graph of its own on a thread of its own, for one command.
///
/// Confined to its thread, once it runs.
public final class ToolSession: @unchecked Sendable {
    public let thread: IOThread
    public let graph: BlockGraph

    public static let registry = DriverRegistry(
        BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)

    /// The texts of the objects that were made.
    var madeObjects: Set<String> = []

    private init(_ thread: IOThread) {
        self.thread = thread
        graph = BlockGraph(on: thread, registry: Self.registry)
    }

    /// Runs `body` on a fresh graph and closes everything afterwards.
    public static func run<T: Sendable>(
        _ body: @escaping @Sendable (ToolSession) async throws(BlockError) -> T
    ) throws(BlockError) -> T {
        let thread = try IOThread(name: "merino")
        defer { thread.stop() }
        let session = ToolSession(thread)
        return try thread.runBlocking { () async throws(BlockError) -> T in
            do throws(BlockError) {
                let result = try await body(session)
                try await session.graph.closeAll()
                return result
            } catch {
                try? await session.graph.closeAll()
                throw error
            }
        }
    }

    /// Opens an image.
    ///
    /// - Parameter start: where in it the node begins, in bytes: a multiple of 512.
    /// - Returns: its top node, held as "command".
    public func open(
        _ source: ImageSource, from start: Int = 0
    ) async throws(BlockError) -> BlockNode {
        var options = try await options(for: source)
        if start > 0 { options = try window(options, from: start) }
        let node = try await graph.open(options, inheriting: source.inherited)
        node.hold("command")
        node.release("opening")
        return node
    }

    /// Opens an image for `user`, which is named in errors.
    ///
    /// - Returns: the use of its top node; ``BlockGraph/detach(_:)`` ends it and closes the image.
    public func use(
        _ source: ImageSource, as user: String, _ access: Access = .read
    ) async throws(BlockError) -> Edge {
        if source.isTemporary {
            let node = try await openTemporary(source)
            defer { node.release("command") }
            return try graph.attach(NamedUser(user), to: node, access)
        }
        var options = try await options(for: source)
        if source.copiesOnRead { options = ["driver": "copy-on-read", "file": options] }
        let node = try await graph.open(options, inheriting: source.inherited)
        defer { node.release("opening") }
        return try graph.attach(NamedUser(user), to: node, access)
    }

    /// Options of a raw node over the image, and of the image itself below it.
    private func window(
        _ image: JSONValue, from start: Int
    ) throws(BlockError) -> JSONValue {
        guard case .object(var below) = image else { return image }
        var options: JSONObject = ["driver": "raw", "offset": .integer(start)]
        for key in ["read-only", "discard", "detect-zeroes", "cache"] {
            options[key] = below[key]
        }
        below["detect-zeroes"] = nil
        options["file"] = .object(below)
        return .object(options)
    }
}
