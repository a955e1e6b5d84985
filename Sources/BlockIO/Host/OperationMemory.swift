import BlockCore

#if os(Linux)
import CLiburing
#endif

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// What the kernel reads of an operation while it runs, beside the data: I/O vectors, a message
/// header, an address. Freed with the last reference.
final class OperationMemory {
    private(set) var vectors: UnsafeMutablePointer<iovec>?
    private(set) var vectorCount: UInt32 = 0
    private(set) var message: UnsafeMutablePointer<msghdr>?
    private var addressStorage: UnsafeMutablePointer<sockaddr_storage>?
    private(set) var addressLength: socklen_t = 0

    var address: UnsafeMutablePointer<sockaddr>? {
        addressStorage.map { UnsafeMutableRawPointer($0).assumingMemoryBound(to: sockaddr.self) }
    }

    private init() {}

    static func vectors(of vector: IOVector) -> OperationMemory {
        let memory = OperationMemory()
        memory.fill(vector)
        return memory
    }

    static func message(of vector: IOVector) -> OperationMemory {
        let memory = OperationMemory()
        memory.fill(vector)
        let message = UnsafeMutablePointer<msghdr>.allocate(capacity: 1)
        message.initialize(to: msghdr())
        message.pointee.msg_iov = memory.vectors
        message.pointee.msg_iovlen = .init(memory.vectorCount)
        memory.message = message
        return memory
    }

    static func address(_ address: SocketAddress) -> OperationMemory {
        let memory = OperationMemory()
        let storage = UnsafeMutablePointer<sockaddr_storage>.allocate(capacity: 1)
        storage.initialize(to: sockaddr_storage())
        memory.addressLength = HostAddress.fill(storage, address)
        memory.addressStorage = storage
        return memory
    }

    /// The kernel takes no more than this many parts at once (`IOV_MAX`).
    static let vectorCountMax = 1024

    private func fill(_ vector: IOVector) {
        let count = min(vector.segmentCount, Self.vectorCountMax)
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: max(count, 1))
        vectorCount = UInt32(vector.store(in: vectors, capacity: count))
        self.vectors = vectors
    }

    #if os(Linux)
    private(set) var time: UnsafeMutablePointer<__kernel_timespec>?

    static func time(nanoseconds: UInt64) -> OperationMemory {
        let memory = OperationMemory()
        let time = UnsafeMutablePointer<__kernel_timespec>.allocate(capacity: 1)
        time.initialize(to: __kernel_timespec())
        time.pointee.tv_sec = Int64(nanoseconds / 1_000_000_000)
        time.pointee.tv_nsec = Int64(nanoseconds % 1_000_000_000)
        memory.time = time
        return memory
    }
    #endif

    deinit {
        #if os(Linux)
        time?.deallocate()
        #endif
        vectors?.deallocate()
        message?.deallocate()
        addressStorage?.deallocate()
    }
}

extension IOVector {
    /// Writes the first `capacity` parts as I/O vectors.
    /// - Returns: how many were written.
    @inline(__always)
    func store(in vectors: UnsafeMutablePointer<iovec>, capacity: Int) -> Int {
        var index = 0
        forEachSegment { segment in
            guard index < capacity else { return }
            vectors[index] = iovec(iov_base: segment.bytes.baseAddress, iov_len: segment.count)
            index += 1
        }
        return index
    }
}
