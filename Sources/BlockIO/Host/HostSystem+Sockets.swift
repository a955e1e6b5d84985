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

/// The host's sockets.
extension HostSystem {
    func listen(_ address: SocketAddress, backlog: Int32) throws(BlockError) -> IOHandle {
        let handle = try socket(for: address)
        do throws(BlockError) {
            switch address {
            case .ipv4, .ipv6: setOption(handle, SOL_SOCKET, SO_REUSEADDR)
            case .unix(let path, abstract: false): removeStaleSocket(path)
            default: break
            }
            if case .ipv6 = address { setOption(handle, Int32(IPPROTO_IPV6), IPV6_V6ONLY) }
            let memory = OperationMemory.address(address)
            guard bind(handle.rawValue, memory.address, memory.addressLength) == 0 else {
                throw .system("cannot bind to \(address)", errno)
            }
            guard hostListen(handle.rawValue, backlog) == 0 else {
                throw .system("cannot listen on \(address)", errno)
            }
        } catch {
            close(handle)
            throw error
        }
        return handle
    }

    /// A socket file that nobody listens on any more stands in the way of a new one.
    private func removeStaleSocket(_ path: String) {
        var info = stat()
        guard lstat(path, &info) == 0, info.st_mode & S_IFMT == S_IFSOCK else { return }
        let probe = hostSocket(AF_UNIX)
        guard probe >= 0 else { return }
        defer { _ = hostClose(probe) }
        let memory = OperationMemory.address(.unix(path: path))
        if connect(probe, memory.address, memory.addressLength) != 0, errno == ECONNREFUSED {
            unlink(path)
        }
    }

    func socket(for address: SocketAddress) throws(BlockError) -> IOHandle {
        try HostAddress.check(address)
        let descriptor = hostSocket(HostAddress.family(of: address))
        guard descriptor >= 0 else { throw .system("cannot make a socket", errno) }
        return IOHandle(descriptor)
    }

    func localAddress(of handle: IOHandle) throws(BlockError) -> SocketAddress {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        let result = withUnsafeMutablePointer(to: &storage) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                getsockname(handle.rawValue, $0, &length)
            }
        }
        guard result == 0 else { throw .system("cannot find a socket's address", errno) }
        guard let address = HostAddress.parse(storage, length: length) else {
            throw BlockError(.unsupported, "a socket of an unknown address family")
        }
        return address
    }

    func adopt(_ handle: IOHandle) throws(BlockError) {
        let flags = fcntl(handle.rawValue, F_GETFL)
        guard flags >= 0, fcntl(handle.rawValue, F_SETFL, flags | O_NONBLOCK) == 0,
            fcntl(handle.rawValue, F_SETFD, FD_CLOEXEC) == 0
        else {
            throw .system("cannot take over descriptor \(handle.rawValue)", errno)
        }
    }

    func shutdown(_ handle: IOHandle) {
        _ = hostShutdown(handle.rawValue, Int32(SHUT_RDWR))
    }

    func shutdownReceiving(_ handle: IOHandle) {
        _ = hostShutdown(handle.rawValue, Int32(SHUT_RD))
    }

    func prepareConnection(_ handle: IOHandle) {
        setOption(handle, Int32(IPPROTO_TCP), TCP_NODELAY)
        setOption(handle, SOL_SOCKET, SO_KEEPALIVE)
    }

    /// Linux doubles it, for what it keeps beside the data, and gives what `net.core.wmem_max` allows: at least
    /// twice of what sockets begin with.
    private static let localSendBufferBytes: Int32 = 512 << 10

    func holdMore(in handle: IOHandle) {
        setOption(handle, SOL_SOCKET, SO_SNDBUF, to: Self.localSendBufferBytes)
    }

    func setKeepAlive(_ handle: IOHandle, _ keepAlive: KeepAlive) {
        setOption(handle, SOL_SOCKET, SO_KEEPALIVE, to: keepAlive.isOn ? 1 : 0)
        #if canImport(Darwin)
        let idle = TCP_KEEPALIVE
        #else
        let idle = TCP_KEEPIDLE
        #endif
        let level = Int32(IPPROTO_TCP)
        if let seconds = keepAlive.idleSeconds { setOption(handle, level, idle, to: seconds) }
        if let seconds = keepAlive.intervalSeconds {
            setOption(handle, level, TCP_KEEPINTVL, to: seconds)
        }
        if let count = keepAlive.probeCount { setOption(handle, level, TCP_KEEPCNT, to: count) }
    }

    private func setOption(
        _ handle: IOHandle, _ level: Int32, _ option: Int32, to value: Int32 = 1
    ) {
        var value = value
        setsockopt(handle.rawValue, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
    }
}

private func hostSocket(_ family: Int32) -> Int32 {
    #if os(Linux)
    return linux_socket(family)
    #else
    let descriptor = socket(family, SOCK_STREAM, 0)
    if descriptor >= 0 {
        _ = fcntl(descriptor, F_SETFL, O_NONBLOCK)
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
    }
    return descriptor
    #endif
}
private func hostListen(_ descriptor: Int32, _ backlog: Int32) -> Int32 {
    listen(descriptor, backlog)
}
private func hostShutdown(_ descriptor: Int32, _ direction: Int32) -> Int32 {
    shutdown(descriptor, direction)
}

extension SocketAddress: CustomStringConvertible {
    public var description: String {
        switch self {
        case .unix(let path, let abstract): abstract ? "unix:@\(path)" : "unix:\(path)"
        case .ipv4(let address, let port):
            "\(address >> 24).\(address >> 16 & 255).\(address >> 8 & 255).\(address & 255):\(port)"
        case .ipv6(let bytes, let port, _):
            "[\(Self.text(ofIPv6: bytes))]:\(port)"
        case .vsock(let cid, let port): "vsock:\(cid):\(port)"
        }
    }

    private static func text(ofIPv6 bytes: [UInt8]) -> String {
        var storage = in6_addr()
        withUnsafeMutableBytes(of: &storage) { $0.copyBytes(from: bytes.prefix(16)) }
        return withUnsafeTemporaryAllocation(of: CChar.self, capacity: 64) { buffer in
            guard let base = buffer.baseAddress,
                inet_ntop(AF_INET6, &storage, base, socklen_t(buffer.count)) != nil
            else { return "?" }
            return String(cString: base)
        }
    }

    /// The addresses of a host name or number. Blocks: run it on a worker thread.
    public static func resolve(
        host: String, port: UInt16, passive: Bool, ipv4: Bool = true, ipv6: Bool = true,
        numeric: Bool = false
    ) throws(BlockError) -> [SocketAddress] {
        try HostAddress.resolve(
            host: host, port: port, passive: passive, ipv4: ipv4, ipv6: ipv6, numeric: numeric)
    }
}
