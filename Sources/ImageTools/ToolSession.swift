import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import QMP

/// A graph of its own on a thread of its own, for one command.
public final class ToolSession: Sendable {
    public let thread: IOThread
    public let graph: BlockGraph

    public static let registry = DriverRegistry(
        BlockProtocols.drivers + BlockFormats.drivers + BlockFilters.drivers)

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
    /// - Returns: its top node, held by the monitor.
    public func open(_ source: ImageSource) async throws(BlockError) -> BlockNode {
        let options = try await options(for: source)
        let node = try await graph.open(options)
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
        let node = try await graph.open(try await options(for: source))
        defer { node.release("opening") }
        return try graph.attach(NamedUser(user), to: node, access)
    }
}
