import BlockCore
import BlockGraph
import BlockIO

/// `blklogwrites`: writes down every change, in the format of Linux's `dm-log-writes`, so that tools can
/// replay what had been done to the disk up to any moment.
///
/// A change is logged when it is done, and completes when it is logged.
public final class BlockLogWritesFilter: FilterDriver, @unchecked Sendable {
    private let node: BlockNode
    public let child: Edge
    private let logEdge: Edge
    private let log: WriteLog

    private init(_ node: BlockNode, _ child: Edge, _ logEdge: Edge, _ log: WriteLog) {
        self.node = node
        self.child = child
        self.logEdge = logEdge
        self.log = log
        node.size = child.size
        var limits = child.node.limits
        limits.requestAlignment = max(limits.requestAlignment, log.sectorSize)
        node.limits = limits
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> BlockLogWritesFilter {
        let options = opening.options
        let appends = try options.bool("log-append") ?? false
        let given = try options.size("log-sector-size")
        let interval = try options.size("log-super-update-interval") ?? 4096
        if let given, !given.isPowerOfTwo || !WriteLog.sectorSizes.contains(given) {
            throw BlockError(
                .invalidArgument,
                "'log-sector-size' must be a power of two from \(WriteLog.sectorSizes.lowerBound) "
                    + "and below \(WriteLog.sectorSizes.upperBound), not \(given)")
        }
        guard interval > 0 else {
            throw BlockError(.invalidArgument, "'log-super-update-interval' cannot be 0")
        }
        let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
        let logEdge = try await opening.requiredChild("log", roles: .metadata)
        let log =
            appends
            ? try await WriteLog.resume(logEdge, updateInterval: interval)
            : WriteLog(logEdge, sectorSize: given ?? 512, updateInterval: interval)
        if appends, let given, given != log.sectorSize {
            throw BlockError(
                .invalidArgument,
                "the log has sectors of \(log.sectorSize) bytes, not of \(given)")
        }
        return BlockLogWritesFilter(opening.node, child, logEdge, log)
    }

    public func access(to edge: Edge, for users: Access) -> Access {
        guard edge === logEdge else { return users }
        // Also without users: the header is brought up to date at the end.
        return Access(
            uses: node.isReadOnly ? .consistentRead : [.consistentRead, .write, .resize],
            shares: .all.subtracting([.write, .resize]))
    }

    public func childResized(_ edge: Edge) {
        if edge === child { node.size = edge.size }
    }

    // MARK: Requests

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await child.write(offset, from: vector, flags)
        try await log.append(
            ByteRange(offset, vector.count), flags.contains(.fua) ? .fua : [], .data(vector))
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await child.writeZeroes(range, flags)
        try await log.append(range, flags.contains(.fua) ? .fua : [], .zeroes)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await child.discard(range)
        try await log.append(range, .discard, .none)
    }

    public func flush() async throws(BlockError) {
        try await child.flush()
        guard !node.isReadOnly else { return }
        try await log.append(ByteRange(0, 0), .flush, .none)
    }

    public func close() async throws(BlockError) {
        try await log.finish()
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        // The format has no entry for it: what is replayed has the size that the disk had first.
        throw BlockError(.unsupported, "a disk whose writes are logged cannot be resized")
    }
}

extension BlockLogWritesFilter {
    public static let driver = DriverDescription(
        name: "blklogwrites", kind: .filter,
        open: { opening throws(BlockError) in try await BlockLogWritesFilter.open(opening) })
}
