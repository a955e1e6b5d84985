import BlockCore
import BlockGraph
import BlockIO
import QMP

/// `null-co` and `null-aio`: a disk that keeps nothing, to measure what is above it.
public final class NullDriver: BlockDriver, @unchecked Sendable {
    private let node: BlockNode
    private let latencyNanoseconds: UInt64
    private let readsZeroes: Bool

    private init(_ node: BlockNode, latencyNanoseconds: UInt64, readsZeroes: Bool) {
        self.node = node
        self.latencyNanoseconds = latencyNanoseconds
        self.readsZeroes = readsZeroes
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> NullDriver {
        let size = try opening.options.size("size") ?? 1 << 30
        let latency = try opening.options.int("latency-ns") ?? 0
        let readsZeroes = try opening.options.bool("read-zeroes") ?? false
        guard size >= 0, size <= Limits.nodeSizeMax, latency >= 0 else {
            throw BlockError(.invalidArgument, "'size' or 'latency-ns' is out of bounds")
        }
        opening.node.size = size
        return NullDriver(
            opening.node, latencyNanoseconds: UInt64(latency), readsZeroes: readsZeroes)
    }

    private func pause() async {
        if latencyNanoseconds > 0 { await node.thread.sleep(nanoseconds: latencyNanoseconds) }
    }

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        await pause()
        // Memory from the pool may hold another request's data: it never reaches a client.
        vector.fill(0)
    }

    public var supportsFUA: Bool { true }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        await pause()
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        await pause()
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        await pause()
    }

    public func flush() async throws(BlockError) {
        await pause()
    }

    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        answer.append(
            BlockStatus(
                readsZeroes ? [.zero, .allocated] : [.data, .allocated], count: range.count,
                mapping: .init(node: node, offset: range.offset)))
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        throw BlockError(.unsupported, "a null disk cannot be resized")
    }

    public var filename: String { "\(node.description.name)://" }
}
