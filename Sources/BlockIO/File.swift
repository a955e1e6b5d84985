import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// An open file or block device on one ``IOThread`` at a time. Confined to that thread.
///
/// Reads and writes are whole: short transfers are continued. What the page cache can serve goes
/// without a trip through the engine; where that keeps failing or stalling, it is left off for a
/// while.
///
/// A write to the page cache may have to wait for the storage, and everything on the thread with it. So
/// it is made at once only where the file system says that it need not wait, or where it cannot say so
/// but the storage is this machine's own; never on network file systems (see ``ImmediateWrites``), and
/// never for callers that have a deadline (``writesAtOnce``).
public final class File: @unchecked Sendable {
    public private(set) var thread: IOThread
    public let handle: IOHandle
    public let path: String
    /// Past the page cache.
    public let isDirect: Bool
    private var reads = ImmediatePolicy()
    private var writes = ImmediatePolicy()
    private var immediateWrites: ImmediateWrites
    /// Off: whoever waits for writes gives up after a time, and that the thread has to see to.
    public var writesAtOnce = true
    private var isClosed = false
    /// Whoever has to know until when the file is open.
    private var owner: AnyObject?
    /// Long copies go on without what they leave behind in the page cache: it is dropped after use.
    public var isStreaming = false
    private var readWindow = StreamWindow()
    private var writeWindow = StreamWindow()
    /// Parts that are being dropped from the page cache.
    private let drops = OperationsInFlight()
    /// What was written and did not get to the storage when it was dropped from the page cache. The system
    /// told of it then, and does so once.
    private var writeBackFailure: BlockError?
    private static let dropCountMax = 8
    /// Long writes to the page cache of a regular file. The file system lets one of them in at a time; the
    /// others would spin until it is their turn.
    private let longWrites: WorkLane?

    /// Transfers of this many bytes are copied on another processor: this thread goes on meanwhile.
    private static let asideBytesMin = Limits.immediateBytesMax
    /// A buffered write that takes longer than this waits for the disk: the thread must not.
    private static let slowWriteNanoseconds: UInt64 = 2_000_000

    private init(
        thread: IOThread, handle: IOHandle, path: String, isDirect: Bool,
        isRegular: Bool, _ immediateWrites: ImmediateWrites
    ) {
        self.thread = thread
        self.handle = handle
        self.path = path
        self.isDirect = isDirect
        self.immediateWrites = immediateWrites
        longWrites =
            isRegular && !isDirect && thread.engine.offloadsWork
            ? WorkLane() : nil
    }

    /// Opens `path` for use on `thread`, which the caller is on.
    ///
    /// - Parameter name: what it is to be called, where that is not its path.
    public static func open(
        _ path: String, _ options: FileOptions, as name: String? = nil, on thread: IOThread
    ) async throws(BlockError) -> File {
        thread.preconditionOnThread()
        let system = thread.system
        let (handle, isRegular, immediate) = try await thread.offload {
            () throws(BlockError) -> (IOHandle, Bool, ImmediateWrites) in
            let handle = try system.open(path, options)
            return (handle, Self.isRegular(handle, system), system.immediateWrites(of: handle))
        }
        return File(
            thread: thread, handle: handle, path: name ?? path, isDirect: options.direct,
            isRegular: isRegular, immediate)
    }

    /// Takes over a file that somebody else opened, under the name it is to have in messages.
    ///
    /// - Parameter owner: kept until the file is closed.
    public static func adopt(
        _ handle: IOHandle, as path: String, isDirect: Bool, owner: AnyObject? = nil,
        on thread: IOThread
    ) async -> File {
        thread.preconditionOnThread()
        let system = thread.system
        let (isRegular, immediate) = await thread.offload {
            (Self.isRegular(handle, system), system.immediateWrites(of: handle))
        }
        let file = File(
            thread: thread, handle: handle, path: path, isDirect: isDirect, isRegular: isRegular,
            immediate)
        file.owner = owner
        return file
    }

    private static func isRegular(_ handle: IOHandle, _ system: any IOSystem) -> Bool {
        do throws(BlockError) { return try system.status(of: handle).kind == .regular } catch {
            return false
        }
    }

    /// Gives the file to another thread; the caller is on the one that has it, and no request is in flight.
    public func move(to other: IOThread) {
        thread.preconditionOnThread()
        thread = other
    }

    /// Returns when nothing is under way but requests.
    public func settle() async {
        await drops.until(atMost: 0)
    }
    /// Whether nothing is.
    public var isSettled: Bool { drops.count == 0 }

    /// Closes the file once. What was not synchronised is not made durable by this.
    public func close() async {
        guard !isClosed else { return }
        isClosed = true
        await drops.until(atMost: 0)
        let (system, handle) = (thread.system, handle)
        await thread.offload { system.close(handle) }
        owner = nil
    }

    // MARK: Data

    /// Reads until `vector` is full or the file ends.
    ///
    /// - Returns: bytes read; less than `vector.count` only at the end of the file.
    public func read(_ vector: IOVector, at offset: Int) async throws(BlockError) -> Int {
        var done = 0
        let goesAside = !isDirect && vector.count >= Self.asideBytesMin
        if !isDirect, !goesAside, reads.mayTry {
            let result = thread.engine.readNow(handle, vector, offset: offset)
            reads.note(succeeded: result == vector.count)
            if let result {
                if result == vector.count || result == 0 { return result }
                if result < 0 { throw failure("read", offset, result) }
                done = result
            }
        }
        while done < vector.count {
            let rest = done == 0 ? vector : vector.slice(done, vector.count - done)
            let operation = IOOperation.read(handle, rest, offset: offset + done)
            let result =
                goesAside ? await thread.performAside(operation) : await thread.perform(operation)
            if result == 0 { break }
            if result == -Int(EINTR) || result == -Int(EAGAIN) { continue }
            if result < 0 { throw failure("read", offset + done, result) }
            done += result
        }
        if isStreaming { await pass(ByteRange(offset, done), written: false) }
        return done
    }

    /// For work on other threads that reads the file there; `nil` where it has to go through the engine.
    public var reader: FileReader? {
        !isDirect && thread.engine.offloadsWork ? FileReader(handle) : nil
    }

    /// Reads what the page cache holds, without waiting.
    ///
    /// - Returns: whether all of `vector` was filled.
    public func readNow(_ vector: IOVector, at offset: Int) -> Bool {
        guard !isDirect, vector.count < Self.asideBytesMin, reads.mayTry else { return false }
        let succeeded = thread.engine.readNow(handle, vector, offset: offset) == vector.count
        reads.note(succeeded: succeeded)
        return succeeded
    }

    /// Writes to the page cache, without waiting for the disk.
    ///
    /// - Returns: whether all of `vector` was taken.
    public func writeNow(_ vector: IOVector, at offset: Int) -> Bool {
        guard !isDirect, vector.count < Self.asideBytesMin else { return false }
        return writeAtOnce(vector, offset) == vector.count
    }

    /// - Returns: `nil` where the engine has to.
    private func writeAtOnce(_ vector: IOVector, _ offset: Int) -> Int? {
        guard writesAtOnce, immediateWrites != .never, writes.mayTry else { return nil }
        let start = thread.now
        var result = thread.engine.writeNow(
            handle, vector, offset: offset, mayWait: immediateWrites == .always)
        if immediateWrites == .unlessBlocked,
            result == -Int(EOPNOTSUPP) || result == -Int(EINVAL)
        {
            immediateWrites = .always
            result = thread.engine.writeNow(handle, vector, offset: offset, mayWait: true)
        }
        writes.note(
            succeeded: result != nil && thread.now &- start < Self.slowWriteNanoseconds)
        return result
    }

    /// Writes all of `vector`. `durable`: it is on stable storage on return.
    public func write(
        _ vector: IOVector, at offset: Int, durable: Bool = false
    ) async throws(BlockError) {
        var done = 0
        let goesAside = !isDirect && vector.count >= Self.asideBytesMin
        if !isDirect, !durable, !goesAside, let result = writeAtOnce(vector, offset) {
            if result < 0 { throw failure("write", offset, result) }
            done = result
        }
        while done < vector.count {
            let rest = done == 0 ? vector : vector.slice(done, vector.count - done)
            let result: Int
            if goesAside, !durable, let longWrites {
                result = await write(rest, offset + done, in: longWrites)
            } else {
                let operation = IOOperation.write(
                    handle, rest, offset: offset + done, durable: durable)
                result =
                    goesAside
                    ? await thread.performAside(operation) : await thread.perform(operation)
            }
            if result == -Int(EINTR) || result == -Int(EAGAIN) { continue }
            if result < 0 { throw failure("write", offset + done, result) }
            guard result > 0 else {
                throw BlockError(
                    .noSpace, "cannot write '\(path)' at offset \(offset + done): nothing was taken"
                )
            }
            done += result
        }
        if durable { try await checkWriteBack() }
        if isStreaming { await pass(ByteRange(offset, done), written: true) }
    }

    private func write(_ vector: IOVector, _ offset: Int, in lane: WorkLane) async -> Int {
        let (handle, workers) = (handle, thread.workers)
        return await withUnsafeContinuation { continuation in
            lane.submit(to: workers) {
                continuation.resume(
                    returning: HostCalls.write(handle, vector, offset: offset))
            }
        }
    }

    /// Has the page cache drop what lies behind a long transfer. What was written goes to the disk first:
    /// a writer that is too far ahead of the disk waits for it.
    private func pass(_ range: ByteRange, written: Bool) async {
        let behind = written ? writeWindow.note(range) : readWindow.note(range)
        guard let behind, !isDirect, !isClosed else { return }
        let number = drops.begin()
        let (system, handle) = (thread.system, handle)
        thread.spawn {
            let error = await self.thread.offload {
                system.dropCache(of: handle, behind, written: written)
            }
            if error != 0, self.writeBackFailure == nil {
                self.writeBackFailure = .system(
                    "cannot write '\(self.path)' back at \(behind.offset)", error)
            }
            self.drops.end(number)
        }
        await drops.until(atMost: Self.dropCountMax)
    }

    /// The system's answer that all is on storage says nothing of what it told to one that was dropping
    /// parts at that time.
    ///
    /// - Throws: when a part did not get there, now or before.
    private func checkWriteBack() async throws(BlockError) {
        await drops.untilBegunEnd()
        if let writeBackFailure { throw writeBackFailure }
    }

    /// Makes what was written before durable.
    ///
    /// - Throws: also when something that was written did not get to the storage before, as long as the
    ///   file is open.
    public func synchronize(dataOnly: Bool = true) async throws(BlockError) {
        while true {
            let result = await thread.perform(.synchronize(handle, dataOnly: dataOnly))
            if result >= 0 { return try await checkWriteBack() }
            if result != -Int(EINTR) {
                throw .system("cannot sync '\(path)'", Int32(truncatingIfNeeded: -result))
            }
        }
    }

    /// Reserves, zeroes or gives back space.
    ///
    /// - Throws: `unsupported` where the file system or device cannot do it.
    public func allocate(_ mode: AllocationMode, _ range: ByteRange) async throws(BlockError) {
        while true {
            let result = await thread.perform(.allocate(handle, mode, range))
            if result >= 0 { return }
            if result != -Int(EINTR) { throw failure("\(mode)", range.offset, result) }
        }
    }

    /// Copies `range` of `source` to `offset` without reading it into memory.
    ///
    /// - Parameter sharing: only where the two files then share their blocks.
    /// - Throws: `unsupported` where the file systems cannot do it; nothing was copied then.
    public func copy(
        from source: File, _ range: ByteRange, to offset: Int, sharing: Bool
    ) async throws(BlockError) {
        let (system, from, to) = (thread.system, source.handle, handle)
        let (sourcePath, path) = (source.path, path)
        try await thread.offload { () throws(BlockError) in
            var done = 0
            while done < range.count {
                let rest = ByteRange(range.offset + done, range.count - done)
                let count: Int
                do throws(BlockError) {
                    count = try system.copyRange(
                        from: from, rest, to: to, at: offset + done, sharing: sharing)
                } catch {
                    throw error.doing("copying '\(sourcePath)' to '\(path)'")
                }
                guard count > 0 else {
                    throw BlockError(
                        .inputOutput,
                        "'\(sourcePath)' ends at \(rest.offset), before its known end",
                        remedy: "something else truncated it")
                }
                done += count
            }
        }
    }

    // MARK: Metadata

    public func status() async throws(BlockError) -> FileStatus {
        let (system, handle) = (thread.system, handle)
        return try await thread.offload { () throws(BlockError) in try system.status(of: handle) }
    }

    public func setSize(_ size: Int) async throws(BlockError) {
        let (system, handle) = (thread.system, handle)
        do throws(BlockError) {
            try await thread.offload { () throws(BlockError) in
                try system.setSize(of: handle, size)
            }
        } catch {
            throw error.doing("'\(path)'")
        }
    }

    /// Whether `offset` holds data, and where that run of data or hole ends.
    ///
    /// - Returns: `nil` when the file ends at or before `offset`.
    public func extent(at offset: Int) async throws(BlockError) -> (isData: Bool, end: Int)? {
        // Quick: the file system answers from its extent tree in memory.
        let system = thread.system
        guard let data = try system.nextData(in: handle, from: offset) else {
            let end = try system.status(of: handle).size
            return end > offset ? (false, end) : nil
        }
        if data > offset { return (false, data) }
        return (true, try system.nextHole(in: handle, from: offset))
    }

    /// Takes or drops a lock; see ``IOSystem/lock(_:_:_:)``.
    public func lock(_ range: ByteRange, _ kind: LockKind) throws(BlockError) -> Bool {
        try thread.system.lock(handle, range, kind)
    }

    public func canLock(_ range: ByteRange, _ kind: LockKind) throws(BlockError) -> Bool {
        try thread.system.canLock(handle, range, kind)
    }

    private func failure(_ verb: String, _ offset: Int, _ result: Int) -> BlockError {
        .system("cannot \(verb) '\(path)' at offset \(offset)", Int32(truncatingIfNeeded: -result))
    }
}

/// Reads a file on whatever thread the caller is on, which may have to wait: on a worker's. Valid while the
/// ``File`` is open.
public struct FileReader: Sendable {
    private let handle: IOHandle

    fileprivate init(_ handle: IOHandle) {
        self.handle = handle
    }

    /// - Returns: whether all of `vector` was filled.
    public func read(_ vector: IOVector, at offset: Int) -> Bool {
        HostCalls.read(handle, vector, offset: offset) == vector.count
    }
}

/// Whether to try an operation at once: yes, until it failed several times in a row; then again
/// after a while.
struct ImmediatePolicy {
    private var failures = 0
    private var pause = 0

    var mayTry: Bool {
        mutating get {
            if pause == 0 { return true }
            pause -= 1
            return false
        }
    }

    mutating func note(succeeded: Bool) {
        if succeeded {
            failures = 0
            return
        }
        failures += 1
        if failures >= 4 {
            failures = 3
            pause = 64
        }
    }
}
