import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

#if os(Linux)
/// `struct sockaddr_vm` of linux/vm_sockets.h, which Glibc's module does not have.
private struct VirtualSocketAddress {
    var family: UInt16
    var reserved: UInt16 = 0
    var port: UInt32
    var cid: UInt32
    var flags: UInt8 = 0
    var zero: (UInt8, UInt8, UInt8) = (0, 0, 0)
}
let vsockFamily: Int32 = 40
#endif

/// Socket addresses as the system lays them out.
enum HostAddress {
    /// A Unix socket's path must fit `sun_path` with its final zero.
    static let unixPathLengthMax = MemoryLayout.size(ofValue: sockaddr_un().sun_path) - 1

    static func family(of address: SocketAddress) -> Int32 {
        switch address {
        case .unix: AF_UNIX
        case .ipv4: AF_INET
        case .ipv6: AF_INET6
        #if os(Linux)
        case .vsock: vsockFamily
        #else
        case .vsock: AF_UNSPEC
        #endif
        }
    }

    /// - Throws: when the address cannot be laid out: a path too long, an address of a wrong size.
    static func check(_ address: SocketAddress) throws(BlockError) {
        switch address {
        case .unix(let path, _):
            guard !path.isEmpty, !path.utf8.contains(0) else {
                throw BlockError(.invalidArgument, "a Unix socket needs a path")
            }
            guard path.utf8.count <= unixPathLengthMax else {
                throw BlockError(
                    .invalidArgument,
                    "the Unix socket path '\(path)' is longer than \(unixPathLengthMax) bytes",
                    remedy: "use a shorter path")
            }
        case .ipv6(let bytes, _, _):
            guard bytes.count == 16 else {
                throw BlockError(.invalidArgument, "an IPv6 address has 16 bytes")
            }
        case .ipv4: break
        case .vsock:
            #if !os(Linux)
            throw BlockError(.unsupported, "vsock sockets are Linux's")
            #endif
        }
    }

    /// Lays `address`, which ``check(_:)`` accepts, out in `storage`.
    /// - Returns: its length.
    static func fill(
        _ storage: UnsafeMutablePointer<sockaddr_storage>, _ address: SocketAddress
    ) -> socklen_t {
        let memory = UnsafeMutableRawPointer(storage)
        switch address {
        case .unix(let path, let abstract):
            let bytes = Array(path.utf8.prefix(unixPathLengthMax))
            let start = MemoryLayout<sockaddr_un>.offset(of: \.sun_path) ?? 2
            storage.pointee.ss_family = sa_family_t(AF_UNIX)
            // An abstract name follows a zero byte, and its length ends it.
            let shift = start + (abstract ? 1 : 0)
            memory.advanced(by: shift).copyMemory(from: bytes, byteCount: bytes.count)
            return socklen_t(abstract ? shift + bytes.count : MemoryLayout<sockaddr_un>.size)
        case .ipv4(let host, let port):
            var value = sockaddr_in()
            value.sin_family = sa_family_t(AF_INET)
            value.sin_port = port.bigEndian
            value.sin_addr.s_addr = host.bigEndian
            memory.storeBytes(of: value, as: sockaddr_in.self)
            return socklen_t(MemoryLayout<sockaddr_in>.size)
        case .ipv6(let bytes, let port, let scope):
            var value = sockaddr_in6()
            value.sin6_family = sa_family_t(AF_INET6)
            value.sin6_port = port.bigEndian
            value.sin6_scope_id = scope
            withUnsafeMutableBytes(of: &value.sin6_addr) { $0.copyBytes(from: bytes.prefix(16)) }
            memory.storeBytes(of: value, as: sockaddr_in6.self)
            return socklen_t(MemoryLayout<sockaddr_in6>.size)
        case .vsock(let cid, let port):
            #if os(Linux)
            memory.storeBytes(
                of: VirtualSocketAddress(family: UInt16(vsockFamily), port: port, cid: cid),
                as: VirtualSocketAddress.self)
            return socklen_t(MemoryLayout<VirtualSocketAddress>.size)
            #else
            return 0
            #endif
        }
    }

    /// The address in `storage`, or `nil` when its family is none of ours.
    static func parse(_ storage: sockaddr_storage, length: socklen_t) -> SocketAddress? {
        withUnsafeBytes(of: storage) { bytes in
            switch Int32(storage.ss_family) {
            case AF_UNIX:
                let start = MemoryLayout<sockaddr_un>.offset(of: \.sun_path) ?? 2
                let end = min(Int(length), bytes.count)
                guard end > start else { return .unix(path: "") }
                let abstract = bytes[start] == 0
                let name = bytes[(start + (abstract ? 1 : 0))..<end]
                let path = abstract ? name : name.prefix { $0 != 0 }
                return .unix(path: String(decoding: path, as: UTF8.self), abstract: abstract)
            case AF_INET:
                let value = bytes.loadUnaligned(as: sockaddr_in.self)
                return .ipv4(
                    address: UInt32(bigEndian: value.sin_addr.s_addr),
                    port: UInt16(bigEndian: value.sin_port))
            case AF_INET6:
                let value = bytes.loadUnaligned(as: sockaddr_in6.self)
                return .ipv6(
                    address: withUnsafeBytes(of: value.sin6_addr) { Array($0) },
                    port: UInt16(bigEndian: value.sin6_port), scope: value.sin6_scope_id)
            #if os(Linux)
            case vsockFamily:
                let value = bytes.loadUnaligned(as: VirtualSocketAddress.self)
                return .vsock(cid: value.cid, port: value.port)
            #endif
            default:
                return nil
            }
        }
    }

    /// The addresses of a host name or number; blocks while names are looked up.
    ///
    /// - Parameters:
    ///   - host: a name, an address, or empty for any address when `passive`.
    ///   - passive: the address is to listen on.
    ///   - numeric: names are not looked up.
    static func resolve(
        host: String, port: UInt16, passive: Bool, ipv4: Bool, ipv6: Bool, numeric: Bool
    ) throws(BlockError) -> [SocketAddress] {
        var hints = addrinfo()
        hints.ai_family = ipv4 && ipv6 ? AF_UNSPEC : ipv4 ? AF_INET : AF_INET6
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        hints.ai_flags = (passive ? AI_PASSIVE : 0) | (numeric ? AI_NUMERICHOST : 0)
        var list: UnsafeMutablePointer<addrinfo>?
        let failure = getaddrinfo(host.isEmpty ? nil : host, String(port), &hints, &list)
        guard failure == 0 else {
            throw BlockError(
                .notFound,
                "cannot resolve host '\(host)': \(String(cString: gai_strerror(failure)))")
        }
        defer { freeaddrinfo(list) }
        var result: [SocketAddress] = []
        var next = list
        while let entry = next {
            next = entry.pointee.ai_next
            guard let address = entry.pointee.ai_addr else { continue }
            var storage = sockaddr_storage()
            let length = min(Int(entry.pointee.ai_addrlen), MemoryLayout<sockaddr_storage>.size)
            withUnsafeMutableBytes(of: &storage) {
                $0.copyMemory(from: UnsafeRawBufferPointer(start: address, count: length))
            }
            if let parsed = parse(storage, length: socklen_t(length)) { result.append(parsed) }
        }
        return result
    }
}
