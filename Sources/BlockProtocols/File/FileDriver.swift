import BlockCore
import BlockGraph
import BlockIO
import QMP

/// `file` and `host_device`: a local file, or a block device.
///
/// Flushing is `fdatasync`, or `fsync` once the size has changed. Discards punch holes; zeroes are
/// made by the file system where it can. Sizes that are no multiple of the alignment (direct I/O) are
/// served by reading past the end, where the file has nothing and zeroes are.
public final class FileDriver: BlockDriver, @unchecked Sendable {
    enum Locking: String, Sendable, CaseIterable { case on, off, auto }
    enum AsynchronousIO: String, Sendable, CaseIterable { case threads, native, uring = "io_uring" }

    let node: BlockNode
    var file: File
    let isDevice: Bool
    /// The same for all openings of a file.
    private let identity: FileIdentity
    var locks: ImageLocks?
    /// Set between the two steps of a reopening.
    var reopening: FileReopening?
    /// The file's size; the node's is rounded up to the alignment by nobody: clients see this one.
    private var fileSize: Int
    private var sizeChanged = false
    private var canPunchHoles = true
    private var canZeroRanges = true
    private var canFindHoles: Bool
    /// Where data was last found. Others may make holes there: then it is told of as data, which reads
    /// as the zeroes it is.
    private var knownData = ByteRange(0, 0)
    /// What became of discards, for queries.
    public private(set) var discards = DiscardCounts()

    public struct DiscardCounts: Sendable {
        public var bytes = 0
        public var successes = 0
        public var failures = 0
    }

    private init(
        node: BlockNode, file: File, status: FileStatus, isDevice: Bool, locks: ImageLocks?
    ) {
        self.node = node
        self.file = file
        self.isDevice = isDevice
        identity = status.identity
        self.locks = locks
        fileSize = status.size
        canFindHoles = !isDevice
        node.size = status.size
        setAlignment(status)
        // A file system gives back whole blocks.
        node.limits.allocationUnit = 4096
    }

    func setAlignment(_ status: FileStatus) {
        node.limits.requestAlignment = status.directAlignment
        node.limits.memoryAlignment = status.directAlignment
    }

    // MARK: Open

    static func open(_ opening: NodeOpening, device: Bool) async throws(BlockError) -> FileDriver {
        let options = opening.options
        guard let name = try options.string("filename") else {
            throw BlockError(.invalidArgument, "option 'filename' is missing")
        }
        let locking = try readOptions(options, opening.node.options)
        let path = name.hasPrefix("file:") ? String(name.dropFirst(5)) : name
        let file = try await openFile(path, opening)
        do throws(BlockError) {
            let status = try await file.status()
            try check(status.kind, device: device, path)
            var locks: ImageLocks?
            if locking != .off, !opening.node.options.sharesAll {
                let wanted = ImageLocks(file, required: locking == .on)
                await wanted.waitForEndedHolders(writing: !opening.node.isReadOnly)
                locks = wanted
            }
            return FileDriver(
                node: opening.node, file: file, status: status, isDevice: device, locks: locks)
        } catch {
            await file.close()
            throw error
        }
    }

    /// Reads the options beside the name.
    static func readOptions(
        _ options: OptionReader, _ nodeOptions: NodeOptions
    ) throws(BlockError) -> Locking {
        // The engine is the thread's; the option is taken for compatibility, and checked.
        let mode = try options.enumeration("aio", as: AsynchronousIO.self)
        if mode == .native, !nodeOptions.isDirect {
            throw BlockError(
                .invalidArgument, "aio=native was specified, but it requires cache.direct=on")
        }
        _ = try options.int("aio-max-batch")
        _ = try options.bool("drop-cache")
        return try options.enumeration("locking", as: Locking.self) ?? .auto
    }

    private static func openFile(
        _ path: String, _ opening: NodeOpening
    ) async throws(BlockError) -> File {
        let options = opening.node.options
        let direct = options.isDirect
        do throws(BlockError) {
            return try await openPath(
                path, writable: !options.isReadOnly, direct: direct, opening.graph)
        } catch {
            let mayFallBack = options.autoReadOnly && !options.isReadOnly
            guard mayFallBack, error.code == .permissionDenied || error.code == .readOnly else {
                throw error
            }
        }
        opening.node.setReadOnly()
        return try await openPath(path, writable: false, direct: direct, opening.graph)
    }

    /// Opens a file by its path, or takes it from a set of files that were passed in.
    static func openPath(
        _ path: String, writable: Bool, direct: Bool, _ graph: BlockGraph
    ) async throws(BlockError) -> File {
        let options = FileOptions(writable: writable, direct: direct)
        guard let passed = try graph.descriptorSets.find(path, writable: writable) else {
            return try await File.open(path, options, on: graph.thread)
        }
        return try await PassedFile.open(passed, as: path, options, in: graph)
    }

    private static func check(
        _ kind: FileStatus.Kind, device: Bool, _ path: String
    ) throws(BlockError) {
        switch (kind, device) {
        case (.regular, false), (.blockDevice, true): return
        case (.blockDevice, false):
            throw BlockError(
                .invalidArgument, "'\(path)' is a block device", remedy: "use driver=host_device")
        case (.regular, true):
            throw BlockError(
                .invalidArgument, "'\(path)' is a regular file", remedy: "use driver=file")
        default:
            throw BlockError(
                .invalidArgument, "'\(path)' is neither a regular file nor a block device")
        }
    }

    // MARK: Data

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        let count = try await file.read(vector, at: offset)
        if count < vector.count {
            // Only past the real end of the file are there zeroes. Elsewhere someone cut it short.
            guard offset + count >= fileSize else {
                throw BlockError(
                    .inputOutput,
                    "'\(file.path)' ends at \(offset + count), before its known end at \(fileSize)",
                    remedy: "something else truncated it")
            }
            vector.zero(count, vector.count - count)
        }
    }

    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        file.readNow(vector, at: offset)
    }

    public func writeNow(_ offset: Int, from vector: IOVector) -> Bool {
        file.writesAtOnce = !node.isTimed
        return file.writeNow(vector, at: offset)
    }

    public var supportsFUA: Bool { true }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        file.writesAtOnce = !node.isTimed
        if offset + vector.count > fileSize, !isDevice {
            try await writeLastUnit(offset, from: vector, flags)
        } else {
            try await file.write(vector, at: offset, durable: flags.contains(.fua))
        }
    }

    /// Direct I/O moves whole units, past the end of a file whose size is no multiple of them, and so
    /// makes the file longer: it is cut back. The write is serialising, as resizing is: they do not
    /// meet.
    private func writeLastUnit(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        do throws(BlockError) {
            try await file.write(vector, at: offset)
        } catch {
            try? await file.setSize(fileSize)
            throw error
        }
        try await file.setSize(fileSize)
        sizeChanged = true
        if flags.contains(.fua) { try await flush() }
    }

    public func writeZeroes(
        _ range: ByteRange, _ flags: WriteFlags
    ) async throws(BlockError) {
        let mode: AllocationMode
        if flags.contains(.mayUnmap), canPunchHoles {
            mode = .punchHole
        } else if canZeroRanges {
            mode = .zeroKeepingSpace
        } else {
            throw BlockError(.unsupported, "the file system cannot zero a range")
        }
        knownData = ByteRange(0, 0)
        do throws(BlockError) {
            try await file.allocate(mode, range)
        } catch  where error.code == .unsupported {
            if mode == .punchHole { canPunchHoles = false } else { canZeroRanges = false }
            throw error
        }
        guard flags.contains(.fua) else { return }
        do throws(BlockError) {
            try await file.synchronize()
        } catch  where error.code == .unsupported {
            // Of what was written before; the zeroes themselves are there, and nothing else is to be tried.
            throw BlockError(.inputOutput, error.message, systemError: error.systemError)
        }
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        guard canPunchHoles else { throw BlockError(.unsupported, "no holes can be made") }
        knownData = ByteRange(0, 0)
        do throws(BlockError) {
            try await file.allocate(.punchHole, range)
        } catch {
            discards.failures += 1
            if error.code == .unsupported { canPunchHoles = false }
            throw error
        }
        discards.successes += 1
        discards.bytes += range.count
    }

    /// For who reads what the driver says is stored here on a worker thread.
    public var reader: FileReader? { file.reader }

    public func locate(_ range: ByteRange) throws(BlockError) -> StoredRange {
        StoredRange(node, range)
    }

    public func copyRange(
        from stored: StoredRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError) {
        guard let source = stored.node.driver as? FileDriver, source !== self, !isDevice,
            !source.isDevice
        else {
            throw BlockError(.unsupported, "no copy within the storage")
        }
        try await file.copy(
            from: source.file, stored.range, to: offset, sharing: method == .share)
    }

    public func flush() async throws(BlockError) {
        let withSize = sizeChanged
        // It may change again meanwhile.
        sizeChanged = false
        do throws(BlockError) {
            try await file.synchronize(dataOnly: !withSize)
        } catch {
            sizeChanged = sizeChanged || withSize
            throw error
        }
    }

    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        var offset = range.offset
        for _ in 0..<Self.statusExtentCountMax where offset < range.end && !answer.isFull {
            let rest = ByteRange(from: offset, to: range.end)
            let (isData, end) = try await extent(rest, precise: precise)
            answer.append(
                BlockStatus(
                    [isData ? .data : .zero, .allocated], count: end - offset,
                    mapping: .init(node: node, offset: offset)))
            offset = end
        }
    }

    /// Extents that one question looks up at most: each takes a system call or two.
    private static let statusExtentCountMax = 128

    /// Whether `range` begins with data, and where in it that ends.
    private func extent(
        _ range: ByteRange, precise: Bool
    ) async throws(BlockError) -> (isData: Bool, end: Int) {
        guard precise, canFindHoles else { return (true, range.end) }
        if knownData.offset <= range.offset, range.offset < knownData.end {
            return (true, min(knownData.end, range.end))
        }
        let found: (isData: Bool, end: Int)?
        do throws(BlockError) {
            found = try await file.extent(at: range.offset)
        } catch  where error.code == .unsupported || error.code == .invalidArgument {
            canFindHoles = false
            return (true, range.end)
        }
        // Nothing more: past the end of what the file has.
        guard let found, found.end > range.offset else { return (false, range.end) }
        if found.isData { knownData = ByteRange(from: range.offset, to: found.end) }
        return (found.isData, min(found.end, range.end))
    }

    // MARK: Size

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        if isDevice {
            guard size == fileSize else {
                throw BlockError(.unsupported, "a device cannot be resized")
            }
            return
        }
        let old = fileSize
        knownData = ByteRange(0, 0)
        switch preallocation {
        case .metadata:
            throw BlockError(
                .unsupported, "preallocation=metadata is for formats, not for files",
                remedy: "use off, falloc or full")
        case .falloc, .full:
            guard size > old else {
                throw BlockError(.unsupported, "preallocation is for growing only")
            }
            try await grow(from: old, to: size, writing: preallocation == .full)
        case .off:
            try await file.setSize(size)
        }
        fileSize = size
        sizeChanged = true
        node.size = size
    }

    private func grow(from old: Int, to size: Int, writing: Bool) async throws(BlockError) {
        do throws(BlockError) {
            if writing {
                let zeroes = try IOVector(allocating: 1 << 20)
                zeroes.fill(0)
                var offset = old
                while offset < size {
                    let count = min(zeroes.count, size - offset)
                    try await file.write(zeroes.slice(0, count), at: offset)
                    offset += count
                }
            } else {
                try await file.allocate(.allocate, ByteRange(from: old, to: size))
            }
        } catch {
            // Nothing half-grown stays behind.
            try? await file.setSize(old)
            throw error
        }
    }

    public func isSameStorage(as other: any BlockDriver) -> Bool {
        (other as? FileDriver)?.identity == identity
    }

    // MARK: Access

    /// The locks from now on, or from the end of a reopening on.
    private var nextLocks: ImageLocks? {
        if let reopening { return reopening.locks }
        return locks
    }

    public func checkAccess(_ access: Access) throws(BlockError) {
        try nextLocks?.prepare(access)
    }

    public func applyAccess(_ access: Access) {
        nextLocks?.commit(access)
    }

    public func abortAccess() {
        nextLocks?.abort()
    }

    public var filename: String { file.path }

    /// Whether long transfers leave nothing behind in the page cache.
    public var isStreaming: Bool {
        get { file.isStreaming }
        set { file.isStreaming = newValue }
    }

    public var information: NodeInformation {
        get async throws(BlockError) { NodeInformation() }
    }

    public func settle() async {
        await file.settle()
    }
    public var isSettled: Bool { file.isSettled }

    public func moves(to thread: IOThread) {
        file.move(to: thread)
    }

    public func close() async throws(BlockError) {
        // Locks go when the last descriptor of the opening does, and a child process that is just being
        // started may have one: who opens the file next need not wait for that.
        locks?.release()
        await file.close()
    }

    /// Space that the file takes on storage, in bytes.
    public func allocatedBytes() async throws(BlockError) -> Int {
        try await file.status().allocatedBytes
    }
}
