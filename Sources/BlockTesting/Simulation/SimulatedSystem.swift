import BlockCore
import BlockIO

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The blocking calls of a simulated machine. Confined to its thread, where ``IOThread/offload(_:)``
/// runs them in place.
final class SimulatedSystem: IOSystem, @unchecked Sendable {
    private let simulation: Simulation
    private let files: SimulatedFiles
    private let network: SimulatedNetwork

    init(_ simulation: Simulation, _ files: SimulatedFiles, _ network: SimulatedNetwork) {
        self.simulation = simulation
        self.files = files
        self.network = network
    }

    func immediateWrites(of handle: IOHandle) -> ImmediateWrites {
        simulation.options.immediateWrites
    }

    private var disk: SimulatedDisk { simulation.disk }

    private func file(
        _ handle: IOHandle, _ verb: String
    ) throws(BlockError) -> OpenFile {
        guard let file = files[handle] else { throw .system(verb, EBADF) }
        return file
    }

    /// - Throws: what a fault rule says.
    private func check(
        _ operation: SimulatedOperation, _ path: String, _ what: String
    ) throws(BlockError) {
        guard !files.isDown else {
            throw BlockError(.disconnected, "the simulated machine is down")
        }
        switch simulation.strike(operation, path, nil) {
        case .fail(let error): throw .system(what, error)
        case .crash:
            simulation.crash()
            throw BlockError(.disconnected, "the simulated machine is down")
        case .hang, .delay, nil: break
        }
    }

    // MARK: Files

    func open(_ path: String, _ options: FileOptions) throws(BlockError) -> IOHandle {
        let what = "cannot \(options.create ? "create" : "open") '\(path)'"
        try check(.open, path, what)
        var file = disk.file(path)
        if file != nil, options.create, options.exclusive { throw .system(what, EEXIST) }
        if file == nil, options.create { file = disk.create(path) }
        guard let file else { throw .system(what, ENOENT) }
        if options.truncate, file.current.size > 0 { file.change(.setSize(0)) }
        let handle = files.add(OpenFile(path: path, file: file, options: options))
        simulation.note("open", Int(file.number), Int(handle.rawValue))
        return handle
    }

    func close(_ handle: IOHandle) {
        guard !files.isDown else { return }
        simulation.note("close", Int(handle.rawValue))
        if !files.close(handle) { network.close(handle) }
    }

    func status(of handle: IOHandle) throws(BlockError) -> FileStatus {
        let open = try file(handle, "cannot stat")
        return FileStatus(
            kind: .regular, size: open.file.current.size,
            allocatedBytes: open.file.current.allocatedBytes,
            directAlignment: open.options.direct ? 4096 : 1,
            identity: FileIdentity(device: 1, inode: open.file.number))
    }

    func setSize(of handle: IOHandle, _ size: Int) throws(BlockError) {
        let what = "cannot set the size to \(size)"
        let open = try file(handle, what)
        try check(.setSize, open.path, what)
        guard open.options.writable, size >= 0 else { throw .system(what, EINVAL) }
        open.file.change(.setSize(size))
        simulation.note("setSize", Int(open.file.number), size)
    }

    func nextData(in handle: IOHandle, from offset: Int) throws(BlockError) -> Int? {
        try file(handle, "cannot look for data").file.current.nextData(from: offset)
    }

    func nextHole(in handle: IOHandle, from offset: Int) throws(BlockError) -> Int {
        try file(handle, "cannot look for a hole").file.current.nextHole(from: offset)
    }

    func dropCache(of handle: IOHandle, _ range: ByteRange, written: Bool) -> Int32 {
        guard written, let open = files[handle] else { return 0 }
        guard case .fail(let error) = simulation.strike(.writeBack, open.path, range) else {
            return 0
        }
        simulation.note("writeBack", Int(open.file.number), Int(error))
        return error
    }

    func remove(_ path: String) throws(BlockError) {
        guard !files.isDown else { throw .system("cannot remove '\(path)'", EIO) }
        if network.removeName(path) { return }
        guard disk.remove(path) else { throw .system("cannot remove '\(path)'", ENOENT) }
    }

    // MARK: Locks

    func lock(_ handle: IOHandle, _ range: ByteRange, _ kind: LockKind) throws(BlockError) -> Bool {
        let file = try file(handle, "cannot lock the image").file
        guard kind == .none || isFree(file, handle, range, kind) else { return false }
        // Whatever the holder had on the range gives way to the new lock.
        var kept: [(holder: IOHandleNumber, range: ByteRange, isExclusive: Bool)] = []
        for lock in file.locks {
            guard lock.holder == handle.rawValue, lock.range.overlaps(range) else {
                kept.append(lock)
                continue
            }
            for (start, end) in [(lock.range.offset, range.offset), (range.end, lock.range.end)]
            where start < end {
                kept.append((lock.holder, ByteRange(from: start, to: end), lock.isExclusive))
            }
        }
        if kind != .none { kept.append((handle.rawValue, range, kind == .exclusive)) }
        file.locks = kept
        return true
    }

    func canLock(
        _ handle: IOHandle, _ range: ByteRange, _ kind: LockKind
    ) throws(BlockError) -> Bool {
        isFree(try file(handle, "cannot ask for the image's locks").file, handle, range, kind)
    }

    private func isFree(
        _ file: SimulatedFile, _ handle: IOHandle, _ range: ByteRange, _ kind: LockKind
    ) -> Bool {
        !file.locks.contains {
            $0.holder != handle.rawValue && $0.range.overlaps(range)
                && ($0.isExclusive || kind == .exclusive)
        }
    }

    func holders(ofLock byte: Int, besides handle: IOHandle) -> [LockHolder] {
        let isHeld = files[handle]?.file.locks.contains {
            $0.holder != handle.rawValue && $0.holder != SimulatedFile.unseenHolder
                && $0.range.contains(ByteRange(byte, 1))
        }
        return isHeld == true ? [.thisProcess] : []
    }

    // MARK: Sockets

    func listen(_ address: SocketAddress, backlog: Int32) throws(BlockError) -> IOHandle {
        try network.listen(address, files.nextHandle())
    }

    func socket(for address: SocketAddress) throws(BlockError) -> IOHandle {
        network.socket(files.nextHandle())
    }

    func localAddress(of handle: IOHandle) throws(BlockError) -> SocketAddress {
        try network.localAddress(of: handle)
    }

    func adopt(_ handle: IOHandle) throws(BlockError) {}
    func shutdown(_ handle: IOHandle) { network.shutdown(handle) }
    func prepareConnection(_ handle: IOHandle) {}
}
