import BlockCore
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The engine over worker threads and `poll(2)`, for systems and sandboxes without io_uring.
///
/// File operations run on the ``WorkerPool`` and post their result; socket operations are tried at
/// once, and wait in the poll set where they would block.
final class ThreadsEngine: IOEngine {
    private struct Waiting {
        let token: IOToken
        let operation: IOOperation
    }

    /// Results of worker threads, and whether the pipe holds a byte already.
    private struct Posted {
        var results: [(IOToken, Int)] = []
        var isSignalled = false
    }

    private final class Mail: Sendable {
        let posted = Mutex(Posted())
        let writeEnd: Int32
        let readEnd: Int32

        init() throws(BlockError) {
            var ends: [Int32] = [0, 0]
            guard pipe(&ends) == 0 else { throw .system("cannot make a pipe", errno) }
            readEnd = ends[0]
            writeEnd = ends[1]
            for end in ends {
                _ = fcntl(end, F_SETFL, O_NONBLOCK)
                _ = fcntl(end, F_SETFD, FD_CLOEXEC)
            }
        }

        deinit {
            _ = hostClose(readEnd)
            _ = hostClose(writeEnd)
        }

        func post(_ token: IOToken?, _ result: Int) {
            let mustSignal = posted.withLock { posted in
                if let token { posted.results.append((token, result)) }
                defer { posted.isSignalled = true }
                return !posted.isSignalled
            }
            if mustSignal {
                var byte: UInt8 = 1
                _ = write(writeEnd, &byte, 1)
            }
        }

        func take() -> [(IOToken, Int)] {
            posted.withLock { posted in
                if posted.isSignalled {
                    var byte: UInt8 = 0
                    while read(readEnd, &byte, 1) == 1 {}
                    posted.isSignalled = false
                }
                let results = posted.results
                posted.results = []
                return results
            }
        }
    }

    private let mail: Mail
    private var waiting: [Waiting] = []
    private var finished: [(IOToken, Int)] = []
    private var pollSet: [pollfd] = []
    private let host = HostSystem()
    private var workers = WorkerPool.shared

    let name = "threads"
    let offloadsWork = true
    var system: any IOSystem { host }
    var now: UInt64 { MonotonicClock.now }

    init() throws(BlockError) {
        mail = try Mail()
    }

    func wake() {
        mail.post(nil, 0)
    }

    func useWorkers(of pool: WorkerPool) {
        workers = pool
    }

    // MARK: Submitting

    func submit(_ operation: IOOperation, _ token: IOToken) {
        let mail = mail
        switch operation {
        case .read(let handle, let vector, let offset):
            workers.submit {
                mail.post(token, HostCalls.read(handle, vector, offset: offset))
            }
        case .write(let handle, let vector, let offset, let durable):
            workers.submit {
                mail.post(
                    token,
                    durable
                        ? HostCalls.writeDurable(handle, vector, offset: offset)
                        : HostCalls.write(handle, vector, offset: offset))
            }
        case .synchronize(let handle, let dataOnly):
            workers.submit {
                mail.post(token, HostCalls.synchronize(handle, dataOnly: dataOnly))
            }
        case .allocate(let handle, let mode, let range):
            workers.submit {
                mail.post(token, HostCalls.allocate(handle, mode, range))
            }
        case .connect(let handle, let address):
            let memory = OperationMemory.address(address)
            if hostConnect(handle.rawValue, memory) == 0 {
                finished.append((token, 0))
            } else if errno == EINPROGRESS {
                waiting.append(Waiting(token: token, operation: operation))
            } else {
                finished.append((token, -Int(errno)))
            }
        case .awaitTaken:
            finished.append((token, 0))
        case .receive, .send, .accept, .awaitReadable:
            if let result = attempt(operation) {
                finished.append((token, result))
            } else {
                waiting.append(Waiting(token: token, operation: operation))
            }
        }
    }

    /// Tries a socket operation; `nil` when it must wait.
    private func attempt(_ operation: IOOperation) -> Int? {
        switch operation {
        case .receive(let handle, let vector): HostCalls.receive(handle, vector)
        case .send(let handle, let vector): HostCalls.send(handle, vector)
        case .accept(let handle): HostCalls.accept(handle)
        case .connect(let handle, _): HostCalls.connectionResult(handle)
        case .awaitReadable(let handle): HostCalls.isReadable(handle) ? 0 : nil
        case .read, .write, .synchronize, .allocate, .awaitTaken: nil
        }
    }

    func cancelAll(on handle: IOHandle) {
        waiting.removeAll { entry in
            guard entry.operation.waitsOn?.handle == handle else { return false }
            finished.append((entry.token, -Int(ECANCELED)))
            return true
        }
    }

    // MARK: Completing

    func poll(deadline: UInt64?, complete: (IOToken, Int) -> Void) {
        let mayWait = finished.isEmpty
        pollSet.removeAll(keepingCapacity: true)
        pollSet.append(pollfd(fd: mail.readEnd, events: Int16(POLLIN), revents: 0))
        for entry in waiting {
            let (handle, events) = entry.operation.waitsOn ?? (IOHandle(-1), 0)
            pollSet.append(pollfd(fd: handle.rawValue, events: events, revents: 0))
        }
        let count = hostPoll(&pollSet, mayWait ? timeout(until: deadline) : 0)
        if count > 0 { attemptReady() }
        for (token, result) in mail.take() { complete(token, result) }
        let done = finished
        finished.removeAll(keepingCapacity: true)
        for (token, result) in done { complete(token, result) }
    }

    private func attemptReady() {
        var kept: [Waiting] = []
        for (index, entry) in waiting.enumerated() {
            if pollSet[index + 1].revents != 0, let result = attempt(entry.operation) {
                finished.append((entry.token, result))
            } else {
                kept.append(entry)
            }
        }
        waiting = kept
    }

    /// Milliseconds, rounded up so as not to spin before the deadline.
    private func timeout(until deadline: UInt64?) -> Int32 {
        guard let deadline else { return -1 }
        let time = now
        guard deadline > time else { return 0 }
        return Int32(clamping: (deadline - time + 999_999) / 1_000_000)
    }

    // MARK: At once

    func readNow(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int? {
        HostCalls.readCached(handle, vector, offset: offset)
    }

    func writeNow(
        _ handle: IOHandle, _ vector: IOVector, offset: Int, mayWait: Bool
    ) -> Int? {
        mayWait
            ? HostCalls.write(handle, vector, offset: offset)
            : HostCalls.writeCached(handle, vector, offset: offset)
    }

    func receiveNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        HostCalls.receive(handle, vector)
    }

    func sendNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        HostCalls.send(handle, vector)
    }
}

extension IOOperation {
    /// What a socket operation waits for in the poll set.
    fileprivate var waitsOn: (handle: IOHandle, events: Int16)? {
        switch self {
        case .receive(let handle, _), .accept(let handle), .awaitReadable(let handle):
            (handle, Int16(POLLIN))
        case .send(let handle, _), .connect(let handle, _): (handle, Int16(POLLOUT))
        case .read, .write, .synchronize, .allocate, .awaitTaken: nil
        }
    }
}

private func hostConnect(_ descriptor: Int32, _ memory: OperationMemory) -> Int32 {
    connect(descriptor, memory.address, memory.addressLength)
}
private func hostPoll(_ set: inout [pollfd], _ timeout: Int32) -> Int32 {
    poll(&set, nfds_t(set.count), timeout)
}
