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

#if os(Linux)
let messageDontWait = linux_dont_wait
let messageNoSignal = linux_no_signal
#else
let messageDontWait = MSG_DONTWAIT
// Connections have SO_NOSIGPIPE set instead.
let messageNoSignal: Int32 = 0
#endif

/// System calls that both host engines make directly: a number, or `nil` for "not now".
enum HostCalls {
    /// Calls `body` with the parts of `vector` as I/O vectors on the stack.
    @inline(__always)
    static func withVectors<T>(
        _ vector: IOVector, _ body: (UnsafeMutablePointer<iovec>, Int32) -> T
    ) -> T {
        if let slice = vector.single {
            var single = iovec(iov_base: slice.bytes.baseAddress, iov_len: slice.count)
            return body(&single, 1)
        }
        let count = min(vector.segmentCount, OperationMemory.vectorCountMax)
        return withUnsafeTemporaryAllocation(of: iovec.self, capacity: max(count, 1)) { memory in
            guard let base = memory.baseAddress else { preconditionFailure("no stack memory") }
            return body(base, Int32(vector.store(in: base, capacity: count)))
        }
    }

    /// Runs a call until it is not interrupted. Returns its result or `-errno`.
    @inline(__always)
    static func uninterrupted(_ call: () -> Int) -> Int {
        while true {
            let result = call()
            if result >= 0 { return result }
            let failure = errno
            if failure != EINTR { return -Int(failure) }
        }
    }

    @inline(__always)
    fileprivate static func unlessBlocked(_ result: Int) -> Int? {
        result == -Int(EAGAIN) || result == -Int(EWOULDBLOCK) ? nil : result
    }

    /// Reads what the page cache holds; `nil` when it holds nothing of it or the file cannot say.
    static func readCached(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int? {
        #if os(Linux)
        let result = withVectors(vector) { vectors, count in
            uninterrupted {
                linux_read_cached(handle.rawValue, vectors, count, off_t(offset))
            }
        }
        return result == -Int(ENOTSUP) ? nil : unlessBlocked(result)
        #else
        return nil
        #endif
    }

    static func read(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int {
        withVectors(vector) { vectors, count in
            uninterrupted { preadv(handle.rawValue, vectors, count, off_t(offset)) }
        }
    }

    static func write(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int {
        withVectors(vector) { vectors, count in
            uninterrupted { pwritev(handle.rawValue, vectors, count, off_t(offset)) }
        }
    }

    /// Writes what the page cache takes without waiting; `nil` when that is nothing right now, a failure
    /// where the file cannot say.
    static func writeCached(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int? {
        #if os(Linux)
        return unlessBlocked(
            withVectors(vector) { vectors, count in
                uninterrupted {
                    linux_write_cached(handle.rawValue, vectors, count, off_t(offset))
                }
            })
        #else
        return -Int(EOPNOTSUPP)
        #endif
    }

    static func writeDurable(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int {
        #if os(Linux)
        let durable = withVectors(vector) { vectors, count in
            uninterrupted {
                linux_write_durable_at(handle.rawValue, vectors, count, off_t(offset))
            }
        }
        // Not every file takes the flag: then it is two calls.
        if durable != -Int(ENOTSUP) { return durable }
        #endif
        let result = write(handle, vector, offset: offset)
        if result < 0 { return result }
        let synced = synchronize(handle, dataOnly: true)
        return synced < 0 ? synced : result
    }

    static func synchronize(_ handle: IOHandle, dataOnly: Bool) -> Int {
        #if os(Linux)
        return uninterrupted {
            Int(dataOnly ? fdatasync(handle.rawValue) : fsync(handle.rawValue))
        }
        #else
        return uninterrupted { Int(fcntl(handle.rawValue, F_FULLFSYNC)) }
        #endif
    }

    static func allocate(_ handle: IOHandle, _ mode: AllocationMode, _ range: ByteRange) -> Int {
        #if os(Linux)
        return uninterrupted {
            Int(
                linux_fallocate(
                    handle.rawValue, mode.fallocateMode, off_t(range.offset), off_t(range.count)))
        }
        #else
        return -Int(ENOTSUP)
        #endif
    }

    static func receive(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        if let slice = vector.single {
            return unlessBlocked(
                uninterrupted {
                    recv(
                        handle.rawValue, slice.bytes.baseAddress, slice.count,
                        messageDontWait)
                })
        }
        return withVectors(vector) { vectors, count in
            var message = msghdr()
            message.msg_iov = vectors
            message.msg_iovlen = .init(count)
            return unlessBlocked(
                uninterrupted { recvmsg(handle.rawValue, &message, messageDontWait) })
        }
    }

    static func send(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        withVectors(vector) { vectors, count in
            var message = msghdr()
            message.msg_iov = vectors
            message.msg_iovlen = .init(count)
            let flags = messageDontWait | messageNoSignal
            return unlessBlocked(
                uninterrupted { sendmsg(handle.rawValue, &message, flags) })
        }
    }
}

extension HostCalls {
    /// The next connection, non-blocking and close-on-exec; `nil` when there is none.
    static func accept(_ handle: IOHandle) -> Int? {
        #if os(Linux)
        return unlessBlocked(uninterrupted { Int(linux_accept(handle.rawValue)) })
        #else
        let result = uninterrupted { Int(Darwin.accept(handle.rawValue, nil, nil)) }
        if result >= 0 {
            _ = fcntl(Int32(result), F_SETFL, O_NONBLOCK)
            _ = fcntl(Int32(result), F_SETFD, FD_CLOEXEC)
        }
        return unlessBlocked(result)
        #endif
    }

    /// How a connection attempt ended that the system says has ended.
    static func connectionResult(_ handle: IOHandle) -> Int {
        var failure: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        guard getsockopt(handle.rawValue, SOL_SOCKET, SO_ERROR, &failure, &length) == 0 else {
            return -Int(errno)
        }
        return -Int(failure)
    }

    static func isReadable(_ handle: IOHandle) -> Bool {
        var set = pollfd(fd: handle.rawValue, events: Int16(POLLIN), revents: 0)
        return poll(&set, 1, 0) > 0
    }
}

extension AllocationMode {
    /// The flags of `fallocate(2)`.
    var fallocateMode: Int32 {
        // FALLOC_FL_KEEP_SIZE 1, PUNCH_HOLE 2, ZERO_RANGE 16 (linux/falloc.h).
        switch self {
        case .allocate: 0
        case .punchHole: 2 | 1
        case .zeroKeepingSpace: 16 | 1
        case .zeroAndGrow: 16
        }
    }
}
