import BlockCore
import BlockGraph
import BlockIO

/// Runs `body` with a graph on a thread of its own, which it may leave open.
public func withGraph<T: Sendable>(
    of drivers: [DriverDescription],
    _ body: @escaping @Sendable (BlockGraph) async throws(BlockError) -> T
) async throws -> T {
    let thread = try IOThread(name: "test")
    defer { thread.stop() }
    return try await thread.run { () async throws(BlockError) -> T in
        try await body(BlockGraph(on: thread, registry: DriverRegistry(drivers)))
    }
}

/// A driver that takes every request and does nothing: a test's own driver says only what it is about.
public protocol IdleDriver: BlockDriver {}

extension IdleDriver {
    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {}
    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {}
    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {}
    public func discard(_ range: ByteRange) async throws(BlockError) {}
    public func flush() async throws(BlockError) {}
    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        answer.append(BlockStatus([.data], count: range.count))
    }
    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {}
    public var filename: String { "idle" }
}
