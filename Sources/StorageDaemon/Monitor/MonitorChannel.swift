import BlockCore
import BlockIO

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

/// The bytes of one monitor's client. Confined to the daemon's thread.
protocol MonitorChannel: AnyObject, Sendable {
    /// Receives at least one byte; 0 is the end.
    func receive(_ vector: IOVector) async throws(BlockError) -> Int
    /// Sends all. One send at a time.
    func send(_ vector: IOVector) async throws(BlockError)
    /// Ends both directions: pending calls return.
    func shutdown()
    func close()
    /// Open files that the client passes along; `nil` where it cannot.
    var descriptors: PassedDescriptors? { get }
}

extension MonitorChannel {
    var descriptors: PassedDescriptors? { nil }
}

extension Socket: MonitorChannel {
    func receive(_ vector: IOVector) async throws(BlockError) -> Int {
        try await receive(vector, isLikelyThere: false)
    }
}

/// Open files that a client passed with its commands. Confined to the daemon's thread.
///
/// Those that no command has asked for yet wait in the order in which they came; `getfd` gives one a
/// name. What is left is closed with the client.
final class PassedDescriptors: @unchecked Sendable {
    /// More than these that wait are closed as they come.
    static let waitingMax = 64
    static let namedMax = 256

    private var waiting: [Int32] = []
    private var named: [String: Int32] = [:]

    func add(_ descriptor: Int32) {
        guard waiting.count < Self.waitingMax else { return Self.close(descriptor) }
        waiting.append(descriptor)
    }

    /// The next one; the caller's to close.
    func take() throws(BlockError) -> Int32 {
        guard !waiting.isEmpty else {
            throw BlockError(
                .invalidArgument, "no open file came with the command",
                remedy: "send it along as SCM_RIGHTS over the Unix socket")
        }
        return waiting.removeFirst()
    }

    func name(_ descriptor: Int32, _ name: String) throws(BlockError) {
        guard named[name] != nil || named.count < Self.namedMax else {
            Self.close(descriptor)
            throw BlockError(.exhausted, "there are \(Self.namedMax) named descriptors already")
        }
        if let old = named.updateValue(descriptor, forKey: name) { Self.close(old) }
    }

    /// Takes a named one; the caller's to close.
    func take(named name: String) -> Int32? { named.removeValue(forKey: name) }

    func closeAll() {
        for descriptor in waiting + named.values { Self.close(descriptor) }
        waiting = []
        named = [:]
    }

    static func close(_ descriptor: Int32) {
        #if canImport(Glibc)
        _ = Glibc.close(descriptor)
        #elseif canImport(Musl)
        _ = Musl.close(descriptor)
        #elseif canImport(Darwin)
        _ = Darwin.close(descriptor)
        #endif
    }
}

#if os(Linux)
/// A Unix socket, whose client may pass open files along.
final class PassingChannel: MonitorChannel, @unchecked Sendable {
    private static let passedAtOnceMax = 16

    private let socket: Socket
    private let passed = PassedDescriptors()
    private var isShutDown = false

    init(_ socket: Socket) {
        self.socket = socket
    }

    var descriptors: PassedDescriptors? { passed }

    func receive(_ vector: IOVector) async throws(BlockError) -> Int {
        var bytes = [UInt8](repeating: 0, count: vector.count)
        while !isShutDown {
            var descriptors = [Int32](repeating: -1, count: Self.passedAtOnceMax)
            var descriptorCount = Int32(descriptors.count)
            let count = linux_receive_with_descriptors(
                socket.handle.rawValue, &bytes, bytes.count, &descriptors, &descriptorCount)
            let failure = errno
            for descriptor in descriptors.prefix(Int(descriptorCount)) { passed.add(descriptor) }
            if count >= 0 {
                bytes.withUnsafeBytes {
                    vector.slice(0, count).copy(
                        from: UnsafeRawBufferPointer(rebasing: $0[..<count]))
                }
                return count
            }
            switch failure {
            case EINTR: continue
            case EAGAIN:
                let ready = await socket.thread.perform(.awaitReadable(socket.handle))
                if ready == -Int(ECANCELED) { return 0 }
            default:
                throw BlockError(
                    .disconnected, "the connection broke: \(BlockError.describe(failure))",
                    systemError: failure)
            }
        }
        return 0
    }

    func send(_ vector: IOVector) async throws(BlockError) {
        try await socket.send(vector)
    }

    func shutdown() {
        isShutDown = true
        socket.shutdown()
    }

    func close() {
        passed.closeAll()
        socket.close()
    }
}
#endif
