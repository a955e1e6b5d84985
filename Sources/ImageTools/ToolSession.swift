import BlockCore
import BlockFilters
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import QMP

/// How an image is named and opened on a command line.
public struct ImageSource: Sendable {
    /// A path, or with ``isOptions`` node options: `driver=qcow2,file.filename=x` or JSON.
    public var name: String
    public var isOptions = false
    /// `nil`: found out from the image's first bytes.
    public var format: String?
    public var isWritable = false
    public var cache = CacheMode.writeback
    public var discards = false
    public var zeroDetection: String?
    public var asynchronousIO: String?
    /// Others may write meanwhile (`-U`).
    public var sharesAll = false

    public init(_ name: String, format: String? = nil) {
        self.name = name
        self.format = format
    }
}

/// The cache modes of QEMU's tools.
public enum CacheMode: String, Sendable, CaseIterable {
    case none, writeback, writethrough, directsync, unsafe

    /// Past the host's page cache.
    public var isDirect: Bool { self == .none || self == .directsync }
    public var ignoresFlush: Bool { self == .unsafe }
    /// Every write is durable before it completes.
    public var isWriteThrough: Bool { self == .writethrough || self == .directsync }
}

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

    /// The node options that open `source`.
    public func options(for source: ImageSource) async throws(BlockError) -> JSONValue {
        var file: JSONObject = ["driver": "file", "filename": .string(source.name)]
        if let status = try? await deviceStatus(source.name), status {
            file["driver"] = "host_device"
        }
        if let aio = source.asynchronousIO { file["aio"] = .string(aio) }
        var format = source.format
        if format == nil { format = try await probe(.object(file)) }
        var options: JSONObject = ["driver": .string(format ?? "raw"), "file": .object(file)]
        options["read-only"] = .bool(!source.isWritable)
        options["discard"] = source.discards ? "unmap" : "ignore"
        if let detection = source.zeroDetection { options["detect-zeroes"] = .string(detection) }
        if source.sharesAll { options["force-share"] = true }
        options["cache"] = [
            "direct": .bool(source.cache.isDirect), "no-flush": .bool(source.cache.ignoresFlush),
        ]
        return .object(options)
    }

    private func deviceStatus(_ path: String) async throws(BlockError) -> Bool {
        let file = try await File.open(path, FileOptions(writable: false), on: thread)
        let kind = try? await file.status().kind
        await file.close()
        return kind == .blockDevice
    }

    private func probe(_ file: JSONValue) async throws(BlockError) -> String {
        guard case .object(var options) = file else { return "raw" }
        options["read-only"] = true
        options["force-share"] = true
        let node = try await graph.open(.object(options))
        let edge = try graph.attach(NamedUser("format detection"), to: node, .read)
        node.release("opening")
        let start = try IOVector(allocating: min(4096, node.size))
        try await edge.read(0, into: start)
        let format = start.array.withUnsafeBytes { Self.registry.probe($0) }
        try await graph.detach(edge)
        return format
    }
}
