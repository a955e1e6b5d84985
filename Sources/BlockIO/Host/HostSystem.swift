import BlockCore

#if os(Linux)
import CLinux
#endif

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The host's files.
struct HostSystem: IOSystem {
    func open(_ path: String, _ options: FileOptions) throws(BlockError) -> IOHandle {
        guard !path.isEmpty, !path.utf8.contains(0) else {
            throw BlockError(.invalidArgument, "a file name is empty or holds a zero byte")
        }
        var flags = O_CLOEXEC | (options.writable ? O_RDWR : O_RDONLY)
        if options.create { flags |= O_CREAT }
        if options.exclusive { flags |= O_EXCL }
        if options.truncate { flags |= O_TRUNC }
        #if os(Linux)
        if options.direct { flags |= linux_open_direct }
        #endif
        let descriptor = HostCalls.uninterrupted { Int(hostOpen(path, flags)) }
        guard descriptor >= 0 else {
            let verb = options.create ? "create" : "open"
            throw .system("cannot \(verb) '\(path)'", Int32(-descriptor))
        }
        return IOHandle(Int32(descriptor))
    }

    func close(_ handle: IOHandle) {
        _ = hostClose(handle.rawValue)
    }

    func status(of handle: IOHandle) throws(BlockError) -> FileStatus {
        var info = stat()
        guard fstat(handle.rawValue, &info) == 0 else { throw .system("cannot stat", errno) }
        let kind: FileStatus.Kind =
            switch info.st_mode & S_IFMT {
            case S_IFREG: .regular
            case S_IFBLK: .blockDevice
            case S_IFCHR: .characterDevice
            case S_IFDIR: .directory
            default: .other
            }
        var size = Int(info.st_size)
        if kind == .blockDevice {
            let end = lseek(handle.rawValue, 0, SEEK_END)
            guard end >= 0 else { throw .system("cannot find the device's size", errno) }
            size = Int(end)
        }
        return FileStatus(
            kind: kind, size: size, allocatedBytes: Int(info.st_blocks) * 512,
            directAlignment: directAlignment(of: handle),
            identity: FileIdentity(device: UInt64(info.st_dev), inode: UInt64(info.st_ino)))
    }

    /// 4096 suits every device with sectors of 512 or 4096 bytes and every file system's pages.
    private func directAlignment(of handle: IOHandle) -> Int {
        #if os(Linux)
        let flags = fcntl(handle.rawValue, F_GETFL)
        return flags >= 0 && flags & linux_open_direct != 0 ? 4096 : 1
        #else
        return 1
        #endif
    }

    func immediateWrites(of handle: IOHandle) -> ImmediateWrites {
        #if os(Linux)
        return linux_is_local(handle.rawValue) != 0 ? .unlessBlocked : .never
        #else
        return .always
        #endif
    }

    func setSize(of handle: IOHandle, _ size: Int) throws(BlockError) {
        let result = HostCalls.uninterrupted { Int(ftruncate(handle.rawValue, off_t(size))) }
        guard result >= 0 else { throw .system("cannot set the size to \(size)", Int32(-result)) }
    }

    func nextData(in handle: IOHandle, from offset: Int) throws(BlockError) -> Int? {
        let found = lseek(handle.rawValue, off_t(offset), hostSeekData)
        if found >= 0 { return Int(found) }
        if errno == ENXIO { return nil }
        throw .system("cannot look for data at \(offset)", errno)
    }

    func nextHole(in handle: IOHandle, from offset: Int) throws(BlockError) -> Int {
        let found = lseek(handle.rawValue, off_t(offset), hostSeekHole)
        if found >= 0 { return Int(found) }
        if errno == ENXIO { return offset }
        throw .system("cannot look for a hole at \(offset)", errno)
    }

    func copyRange(
        from source: IOHandle, _ range: ByteRange, to target: IOHandle, at offset: Int,
        sharing: Bool
    ) throws(BlockError) -> Int {
        #if os(Linux)
        let result = HostCalls.uninterrupted {
            if sharing {
                let result = linux_clone_range(
                    target.rawValue, off_t(offset), source.rawValue, off_t(range.offset),
                    off_t(range.count))
                return result == 0 ? range.count : -1
            }
            return linux_copy_range(
                source.rawValue, off_t(range.offset), target.rawValue, off_t(offset), range.count)
        }
        if result >= 0 { return result }
        switch Int32(-result) {
        case EXDEV, EINVAL, EOPNOTSUPP, ENOSYS, ENOTTY, EBADF, ETXTBSY, EPERM:
            throw BlockError(.unsupported, "the file systems do not copy that by themselves")
        default:
            throw .system("cannot copy at offset \(range.offset)", Int32(-result))
        }
        #else
        throw BlockError(.unsupported, "the system copies nothing by itself")
        #endif
    }

    func dropCache(of handle: IOHandle, _ range: ByteRange, written: Bool) -> Int32 {
        #if os(Linux)
        let (offset, count) = (off_t(range.offset), off_t(range.count))
        // Pages that are not on the disk yet stay: they go there first.
        let result = written ? linux_write_back(handle.rawValue, offset, count) : 0
        _ = posix_fadvise(handle.rawValue, offset, count, POSIX_FADV_DONTNEED)
        return result
        #else
        return 0
        #endif
    }

    func remove(_ path: String) throws(BlockError) {
        guard unlink(path) == 0 else { throw .system("cannot remove '\(path)'", errno) }
    }

    func lock(_ handle: IOHandle, _ range: ByteRange, _ kind: LockKind) throws(BlockError) -> Bool {
        #if os(Linux)
        var request = flock()
        request.l_type = Int16(kind == .none ? F_UNLCK : kind == .shared ? F_RDLCK : F_WRLCK)
        request.l_whence = Int16(SEEK_SET)
        request.l_start = off_t(range.offset)
        request.l_len = off_t(range.count)
        if fcntl(handle.rawValue, hostSetLock, &request) == 0 { return true }
        if errno == EAGAIN || errno == EACCES { return false }
        throw .system("cannot lock the image", errno)
        #else
        throw BlockError(.unsupported, "image locks need open-file-description locks")
        #endif
    }

    func canLock(
        _ handle: IOHandle, _ range: ByteRange, _ kind: LockKind
    ) throws(BlockError) -> Bool {
        #if os(Linux)
        var request = flock()
        request.l_type = Int16(kind == .shared ? F_RDLCK : F_WRLCK)
        request.l_whence = Int16(SEEK_SET)
        request.l_start = off_t(range.offset)
        request.l_len = off_t(range.count)
        guard fcntl(handle.rawValue, hostGetLock, &request) == 0 else {
            throw .system("cannot ask for the image's locks", errno)
        }
        return request.l_type == Int16(F_UNLCK)
        #else
        throw BlockError(.unsupported, "image locks need open-file-description locks")
        #endif
    }

    func holders(ofLock byte: Int, besides handle: IOHandle) -> [LockHolder] {
        #if os(Linux)
        return ProcessFiles.holders(ofLock: byte, besides: handle)
        #else
        return []
        #endif
    }
}

#if os(Linux)
// From Linux's headers, which the module maps leave out: SEEK_DATA, SEEK_HOLE (unistd.h) and the
// commands for open-file-description locks (fcntl.h).
private let hostSeekData: Int32 = 3
private let hostSeekHole: Int32 = 4
private let hostGetLock: Int32 = 36
private let hostSetLock: Int32 = 37
#else
private let hostSeekData: Int32 = SEEK_DATA
private let hostSeekHole: Int32 = SEEK_HOLE
#endif

// The same names as methods of the system: these reach the C functions.
func hostOpen(_ path: String, _ flags: Int32) -> Int32 { open(path, flags, 0o644) }
func hostClose(_ descriptor: Int32) -> Int32 { close(descriptor) }
