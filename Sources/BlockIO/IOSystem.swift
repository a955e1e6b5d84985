import BlockCore

/// How a file is opened.
public struct FileOptions: Sendable, Equatable {
    public var writable: Bool
    /// Past the page cache (`O_DIRECT`).
    public var direct: Bool
    /// Create it, empty, when it is not there.
    public var create: Bool
    /// With `create`: an existing file is an error.
    public var exclusive: Bool
    /// Cut an existing file to nothing.
    public var truncate: Bool

    public init(
        writable: Bool, direct: Bool = false, create: Bool = false, exclusive: Bool = false,
        truncate: Bool = false
    ) {
        self.writable = writable
        self.direct = direct
        self.create = create
        self.exclusive = exclusive
        self.truncate = truncate
    }
}

/// What the system knows of an open file.
public struct FileStatus: Sendable, Equatable {
    public enum Kind: Sendable { case regular, blockDevice, characterDevice, directory, other }
    public var kind: Kind
    /// In bytes; of a block device, its capacity.
    public var size: Int
    /// Space taken on the storage below, in bytes; 0 where it is not known.
    public var allocatedBytes: Int
    /// The unit that direct I/O must be aligned to, offset and memory; 1 without direct I/O.
    public var directAlignment: Int
    /// Names the file whatever its path: two handles on one file have the same.
    public var identity: FileIdentity

    public init(
        kind: Kind, size: Int, allocatedBytes: Int, directAlignment: Int, identity: FileIdentity
    ) {
        self.kind = kind
        self.size = size
        self.allocatedBytes = allocatedBytes
        self.directAlignment = directAlignment
        self.identity = identity
    }
}

/// Whether a buffered write may be made on the thread that everything else of a graph runs on.
public enum ImmediateWrites: Sendable {
    /// No: the storage is another machine's, or not known, and may stall for as long as it likes.
    case never
    /// As long as it need not wait; the file is asked each time.
    case unlessBlocked
    /// Yes: the file cannot say whether it would wait, and its storage is this machine's own.
    case always
}

public struct FileIdentity: Hashable, Sendable {
    public var device: UInt64
    public var inode: UInt64
    public init(device: UInt64, inode: UInt64) {
        self.device = device
        self.inode = inode
    }
}

/// What a byte-range lock asks for.
public enum LockKind: Sendable { case shared, exclusive, none }

/// Who has a lock.
public enum LockHolder: Sendable, Equatable {
    /// This process, by another opening of the file.
    case thisProcess
    /// Another one, as `"name (pid 123)"`.
    case process(String)
}

/// The calls that are not asynchronous anywhere: they may block, and run on worker threads
/// (``IOThread/offload(_:)``) unless they are known to be quick.
public protocol IOSystem: Sendable {
    func open(_ path: String, _ options: FileOptions) throws(BlockError) -> IOHandle
    func close(_ handle: IOHandle)
    func status(of handle: IOHandle) throws(BlockError) -> FileStatus
    /// Whether writes to the file may be made at once, to begin with.
    func immediateWrites(of handle: IOHandle) -> ImmediateWrites
    func setSize(of handle: IOHandle, _ size: Int) throws(BlockError)
    /// The first data at or after `offset`; `nil` when there is none.
    func nextData(in handle: IOHandle, from offset: Int) throws(BlockError) -> Int?
    /// The first hole at or after `offset`; the end of the file is one.
    func nextHole(in handle: IOHandle, from offset: Int) throws(BlockError) -> Int
    /// Copies bytes between files without bringing them to the process; with `sharing` only where
    /// the two then share their blocks.
    ///
    /// - Returns: bytes copied, at least 1; 0 where the source ends.
    /// - Throws: `unsupported` where the file systems cannot do it for this range.
    func copyRange(
        from source: IOHandle, _ range: ByteRange, to target: IOHandle, at offset: Int,
        sharing: Bool
    ) throws(BlockError) -> Int
    /// The page cache need not keep a range: it was read, or written, and is not wanted again.
    ///
    /// - Returns: 0, or the error number of written data that did not get to the storage. Nobody else
    ///   is told of it: a later synchronisation of the handle succeeds.
    func dropCache(of handle: IOHandle, _ range: ByteRange, written: Bool) -> Int32
    func remove(_ path: String) throws(BlockError)

    /// Takes or drops an open-file-description lock on a byte range without waiting.
    ///
    /// - Returns: `true` when it was granted, `false` when another holder refuses it.
    func lock(_ handle: IOHandle, _ range: ByteRange, _ kind: LockKind) throws(BlockError) -> Bool
    /// Whether a lock could be taken.
    func canLock(_ handle: IOHandle, _ range: ByteRange, _ kind: LockKind) throws(BlockError)
        -> Bool
    /// Who has a lock on a byte of the file, `handle` itself aside: those that the system lets us see.
    func holders(ofLock byte: Int, besides handle: IOHandle) -> [LockHolder]

    /// A listening socket, bound to `address`.
    func listen(_ address: SocketAddress, backlog: Int32) throws(BlockError) -> IOHandle
    /// A socket that can be connected to `address`.
    func socket(for address: SocketAddress) throws(BlockError) -> IOHandle
    /// The address that a socket is bound to.
    func localAddress(of handle: IOHandle) throws(BlockError) -> SocketAddress
    /// Makes an inherited socket non-blocking and close-on-exec.
    func adopt(_ handle: IOHandle) throws(BlockError)
    /// Ends both directions; pending operations complete.
    func shutdown(_ handle: IOHandle)
    /// Ends receiving only: a pending receive returns what is there, then the end of the stream.
    func shutdownReceiving(_ handle: IOHandle)
    /// What every connected TCP socket gets: no delay, keep-alive.
    func prepareConnection(_ handle: IOHandle)
    /// Has a Unix socket hold more of what was sent until its peer takes it.
    func holdMore(in handle: IOHandle)
    /// How a TCP socket finds out that its peer is gone without a word.
    func setKeepAlive(_ handle: IOHandle, _ keepAlive: KeepAlive)
}

/// Probes that TCP sends on a connection that is silent.
public struct KeepAlive: Sendable, Equatable {
    public var isOn = true
    /// Silence before the first probe; the system's choice where it is `nil`, as for the others.
    public var idleSeconds: Int32?
    public var intervalSeconds: Int32?
    /// Probes without an answer that end the connection.
    public var probeCount: Int32?

    public init() {}
}

extension IOSystem {
    public func copyRange(
        from source: IOHandle, _ range: ByteRange, to target: IOHandle, at offset: Int,
        sharing: Bool
    ) throws(BlockError) -> Int {
        throw BlockError(.unsupported, "the system copies nothing by itself")
    }

    public func immediateWrites(of handle: IOHandle) -> ImmediateWrites { .unlessBlocked }

    public func dropCache(of handle: IOHandle, _ range: ByteRange, written: Bool) -> Int32 { 0 }

    /// A system without half-closed sockets ends both directions.
    public func shutdownReceiving(_ handle: IOHandle) { shutdown(handle) }
    /// A system whose sockets take what they take.
    public func holdMore(in handle: IOHandle) {}
    /// A system whose peers cannot vanish has nothing to probe.
    public func setKeepAlive(_ handle: IOHandle, _ keepAlive: KeepAlive) {}
}

/// Where a socket listens or connects to; names are resolved already.
public enum SocketAddress: Hashable, Sendable {
    /// A Unix socket's path; `abstract` names have no file.
    case unix(path: String, abstract: Bool = false)
    case ipv4(address: UInt32, port: UInt16)
    case ipv6(address: [UInt8], port: UInt16, scope: UInt32 = 0)
    case vsock(cid: UInt32, port: UInt32)
}
