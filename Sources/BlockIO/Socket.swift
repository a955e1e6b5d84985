import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A connected stream socket on one ``IOThread`` at a time. Confined to that thread.
public final class Socket: @unchecked Sendable {
    public private(set) var thread: IOThread
    public let handle: IOHandle
    private var isClosed = false
    /// Operations that an engine has not completed.
    private var pendingCount = 0
    private var moveCount = 0
    /// A Unix socket, as far as is known.
    private let isLocal: Bool

    /// Takes over a connected, non-blocking socket.
    public init(_ handle: IOHandle, on thread: IOThread, isLocal: Bool = false) {
        self.handle = handle
        self.thread = thread
        self.isLocal = isLocal
    }

    /// Connects to `address`.
    public static func connect(
        to address: SocketAddress, on thread: IOThread
    ) async throws(BlockError) -> Socket {
        let handle = try thread.system.socket(for: address)
        let result = await thread.perform(.connect(handle, address))
        guard result >= 0 else {
            thread.system.close(handle)
            throw .system("cannot connect to \(address)", Int32(truncatingIfNeeded: -result))
        }
        if address.isTCP { thread.system.prepareConnection(handle) }
        return Socket(handle, on: thread, isLocal: address.isLocal)
    }

    /// Receives at least one byte.
    ///
    /// - Parameter isLikelyThere: look before waiting. Where the peer surely needs time, that is wasted.
    /// - Returns: bytes received; 0 at the end of the stream.
    /// - Throws: `disconnected` when the connection broke.
    public func receive(
        _ vector: IOVector, isLikelyThere: Bool = true
    ) async throws(BlockError) -> Int {
        guard !isClosed else { return 0 }
        if isLikelyThere, let result = thread.engine.receiveNow(handle, vector) {
            return try check(result)
        }
        while true {
            let result = await perform(.receive(handle, vector))
            if result == -Int(EINTR) || result == -Int(EAGAIN) { continue }
            return try check(result)
        }
    }

    /// Performs an operation; where the socket moved meanwhile, `-EINTR` has the caller begin again.
    private func perform(_ operation: IOOperation) async -> Int {
        let moves = moveCount
        pendingCount += 1
        let result = await thread.perform(operation)
        pendingCount -= 1
        return result == -Int(ECANCELED) && moves != moveCount ? -Int(EINTR) : result
    }

    /// Gives the socket to another thread; the caller is on the one that has it. Operations that are
    /// pending end there and begin again here, with nothing lost of the stream, as soon as the tasks that
    /// wait for them go on: by then those must run on `other`, as an ``IOSeat``'s do.
    public func move(to other: IOThread) {
        thread.preconditionOnThread()
        guard other !== thread else { return }
        // Nothing is closed while something is pending: it is this socket that is meant.
        if pendingCount > 0 { thread.engine.cancelAll(on: handle) }
        thread = other
        moveCount += 1
    }

    /// Fills all of `vector`.
    ///
    /// - Returns: `false` when the stream ended before its first byte.
    /// - Throws: `disconnected` when it ended or broke later.
    public func receiveAll(_ vector: IOVector) async throws(BlockError) -> Bool {
        var done = 0
        while done < vector.count {
            let count = try await receive(vector.slice(done, vector.count - done))
            if count == 0 {
                if done == 0 { return false }
                throw BlockError(.disconnected, "the peer closed the connection in a message")
            }
            done += count
        }
        return true
    }

    /// Sends all of `vector`. One send at a time: the caller keeps the order.
    public func send(_ vector: IOVector) async throws(BlockError) {
        var done = 0
        while done < vector.count {
            let rest = done == 0 ? vector : vector.slice(done, vector.count - done)
            let result: Int
            if let now = sendNow(rest) {
                result = now
            } else {
                guard !isClosed else {
                    throw BlockError(.disconnected, "the connection is closed")
                }
                result = await perform(.send(handle, rest))
            }
            if result == -Int(EINTR) || result == -Int(EAGAIN) { continue }
            done += try check(result)
        }
    }

    /// Sends what fits into the socket right now.
    ///
    /// - Returns: bytes sent or `-errno`; `nil` when none fit.
    public func sendNow(_ vector: IOVector) -> Int? {
        guard !isClosed else { return nil }
        return thread.engine.sendNow(handle, vector)
    }

    /// Has the socket hold more of what was sent until the peer takes it: for a peer that takes much, which
    /// then is not waited for so often. A connection over a network finds its own measure.
    public func holdMore() {
        guard isLocal, !isClosed else { return }
        thread.system.holdMore(in: handle)
    }

    /// Waits until the peer has taken most of what was sent, or so long.
    ///
    /// - Returns: whether there was anything to wait for.
    public func untilTaken(nanosecondsMax: UInt64) async -> Bool {
        guard !isClosed else { return false }
        let start = thread.now
        _ = await perform(.awaitTaken(handle, nanosecondsMax: nanosecondsMax))
        return thread.now &- start > Self.waitNanosecondsMin
    }

    /// What completes sooner did not wait.
    private static let waitNanosecondsMin: UInt64 = 4_000

    /// Ends the connection in both directions; pending operations complete.
    public func shutdown() {
        guard !isClosed else { return }
        thread.system.shutdown(handle)
    }

    /// Ends receiving only: what is there can still be received, then the stream ends.
    public func shutdownReceiving() {
        guard !isClosed else { return }
        thread.system.shutdownReceiving(handle)
    }

    /// Closes the socket once. No operation may be pending: shut it down and wait first.
    public func close() {
        guard !isClosed else { return }
        isClosed = true
        thread.system.close(handle)
    }

    private func check(_ result: Int) throws(BlockError) -> Int {
        if result >= 0 { return result }
        let systemError = Int32(truncatingIfNeeded: -result)
        throw BlockError(
            .disconnected, "the connection broke: \(BlockError.describe(systemError))",
            systemError: systemError)
    }
}

/// A listening socket on one ``IOThread``. Confined to that thread.
public final class Listener: @unchecked Sendable {
    public let thread: IOThread
    public let handle: IOHandle
    /// Where it listens, the port filled in when it was 0.
    public let address: SocketAddress
    /// Of the TCP connections that come.
    public var keepAlive = KeepAlive()
    /// To be removed at the end. Its whole path: the process may be in another folder by then.
    private let file: String?
    private var isClosed = false

    /// Listens on `address`.
    ///
    /// - Throws: `busy` when the address is in use.
    public init(on address: SocketAddress, thread: IOThread) throws(BlockError) {
        self.thread = thread
        handle = try thread.system.listen(address, backlog: 128)
        do throws(BlockError) {
            self.address = try thread.system.localAddress(of: handle)
        } catch {
            thread.system.close(handle)
            throw error
        }
        if case .unix(let path, abstract: false) = address {
            file = WorkingFolder.absolute(path)
        } else {
            file = nil
        }
    }

    private static let attemptCountMax = 10
    private static let attemptNanoseconds: UInt64 = 20_000_000

    /// Listens on `address`, and waits a little while it is in use: what a process that was killed had under
    /// way in the kernel, its listening sockets with it, may outlive it by some milliseconds.
    ///
    /// - Throws: `busy` when the address stays in use.
    public static func listening(
        on address: SocketAddress, thread: IOThread
    ) async throws(BlockError) -> Listener {
        for _ in 1..<attemptCountMax {
            do throws(BlockError) {
                return try Listener(on: address, thread: thread)
            } catch {
                guard error.systemError == EADDRINUSE else { throw error }
            }
            await thread.sleep(nanoseconds: attemptNanoseconds)
        }
        return try Listener(on: address, thread: thread)
    }

    /// Takes over a listening socket that was inherited, as in socket activation.
    public init(adopting handle: IOHandle, thread: IOThread) throws(BlockError) {
        self.thread = thread
        self.handle = handle
        try thread.system.adopt(handle)
        address = try thread.system.localAddress(of: handle)
        file = nil
    }

    /// The next connection; `nil` once the listener is closed.
    ///
    /// - Throws: `exhausted` when the process is out of descriptors: wait a little, then try again.
    public func accept() async throws(BlockError) -> Socket? {
        while true {
            if isClosed { return nil }
            let result = await thread.perform(.accept(handle))
            if result >= 0 {
                let connection = IOHandle(Int32(truncatingIfNeeded: result))
                if address.isTCP {
                    thread.system.prepareConnection(connection)
                    if keepAlive != KeepAlive() {
                        thread.system.setKeepAlive(connection, keepAlive)
                    }
                }
                return Socket(connection, on: thread, isLocal: address.isLocal)
            }
            if isClosed { return nil }
            switch Int32(truncatingIfNeeded: -result) {
            // The connection was gone before it was taken.
            case EINTR, EAGAIN, ECONNABORTED, EPROTO: continue
            case let failure: throw .system("cannot accept a connection", failure)
            }
        }
    }

    /// Stops listening; a pending ``accept()`` returns `nil`. Removes the socket's file.
    public func close() {
        guard !isClosed else { return }
        isClosed = true
        thread.engine.cancelAll(on: handle)
        let (thread, handle) = (thread, handle)
        // After the turn in which the cancellation reaches the engine.
        thread.spawn {
            await thread.yield()
            thread.system.shutdown(handle)
            thread.system.close(handle)
        }
        if let file { try? thread.system.remove(file) }
    }
}

extension SocketAddress {
    /// Whether it is a Unix socket's.
    var isLocal: Bool {
        if case .unix = self { return true }
        return false
    }

    /// Whether it is TCP's.
    public var isTCP: Bool {
        switch self {
        case .ipv4, .ipv6: true
        case .unix, .vsock: false
        }
    }
}
