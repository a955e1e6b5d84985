import BlockCore
import BlockIO

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// One end of a simulated connection.
private final class Endpoint {
    /// Arrived and not received yet.
    var inbound: [UInt8] = []
    /// Sent to this end and still under way.
    var underwayCount = 0
    /// When the last bytes under way arrive: those after them arrive later.
    var lastArrival: UInt64 = 0
    var hasEnded = false
    var isReset = false
    var isShutDown = false
    var receives: [(token: IOToken, vector: IOVector?)] = []
    var sends: [(token: IOToken, vector: IOVector)] = []
    /// The other end; `nil` once that is closed.
    var peer: Endpoint?
    let address: SocketAddress

    init(_ address: SocketAddress) {
        self.address = address
    }

    var isReadable: Bool { !inbound.isEmpty || hasEnded || isReset || isShutDown }
}

/// A socket of the simulated network that takes connections.
private final class ListeningSocket {
    let address: SocketAddress
    var backlog: [Endpoint] = []
    var accepts: [IOToken] = []
    var readables: [IOToken] = []
    var isShutDown = false

    init(_ address: SocketAddress) {
        self.address = address
    }
}

/// The sockets of a running machine: byte streams whose bytes arrive late, in order, and cut anywhere.
final class SimulatedNetwork {
    private enum Descriptor {
        case unconnected
        case endpoint(Endpoint)
        case listening(ListeningSocket)
    }

    private let simulation: Simulation
    private let files: SimulatedFiles
    weak var engine: SimulatedEngine?
    private var descriptors: [IOHandle: Descriptor] = [:]
    private var listeners: [SocketAddress: ListeningSocket] = [:]
    /// Files of Unix sockets; they stay when the listener closes.
    private var names: Set<String> = []
    private var lastPort: UInt16 = 40_000

    init(_ simulation: Simulation, _ files: SimulatedFiles) {
        self.simulation = simulation
        self.files = files
    }

    private func complete(_ token: IOToken, _ result: Int, after nanoseconds: UInt64? = nil) {
        engine?.complete(token, result, after: nanoseconds ?? latency)
    }

    private var latency: UInt64 { engine?.draw(\.socketNanoseconds) ?? 0 }

    /// What sockets wait for, for the report of a run that is stuck.
    var waitingFor: String? {
        var counts = [0, 0, 0]
        for descriptor in descriptors.values {
            switch descriptor {
            case .unconnected: break
            case .endpoint(let end):
                counts[0] += end.receives.count
                counts[1] += end.sends.count
            case .listening(let socket): counts[2] += socket.accepts.count
            }
        }
        if counts == [0, 0, 0] { return nil }
        return "sockets wait: \(counts[0]) to receive, \(counts[1]) to send, \(counts[2]) to accept"
    }

    // MARK: Calls

    func listen(_ address: SocketAddress, _ handle: IOHandle) throws(BlockError) -> IOHandle {
        let bound = withPort(address)
        guard listeners[bound] == nil else {
            throw .system("cannot bind to \(address)", EADDRINUSE)
        }
        if case .unix(let path, abstract: false) = bound { names.insert(path) }
        let socket = ListeningSocket(bound)
        listeners[bound] = socket
        descriptors[handle] = .listening(socket)
        return handle
    }

    private func withPort(_ address: SocketAddress) -> SocketAddress {
        switch address {
        case .ipv4(let host, 0):
            lastPort += 1
            return .ipv4(address: host, port: lastPort)
        case .ipv6(let host, 0, let scope):
            lastPort += 1
            return .ipv6(address: host, port: lastPort, scope: scope)
        default: return address
        }
    }

    func socket(_ handle: IOHandle) -> IOHandle {
        descriptors[handle] = .unconnected
        return handle
    }

    func localAddress(of handle: IOHandle) throws(BlockError) -> SocketAddress {
        switch descriptors[handle] {
        case .endpoint(let end): return end.address
        case .listening(let socket): return socket.address
        case .unconnected, nil: throw .system("cannot find a socket's address", EBADF)
        }
    }

    /// - Returns: whether `path` was a socket's.
    func removeName(_ path: String) -> Bool {
        guard names.remove(path) != nil else { return false }
        // Who connects by that name finds nobody any more.
        listeners[.unix(path: path)] = nil
        return true
    }

    func shutdown(_ handle: IOHandle) {
        switch descriptors[handle] {
        case .endpoint(let end): shutdown(end)
        case .listening(let socket):
            socket.isShutDown = true
            for token in socket.accepts + socket.readables { complete(token, -Int(EINVAL)) }
            socket.accepts = []
            socket.readables = []
        case .unconnected, nil: break
        }
    }

    private func shutdown(_ end: Endpoint) {
        guard !end.isShutDown else { return }
        end.isShutDown = true
        if let peer = end.peer { arrive(at: peer) { $0.hasEnded = true } }
        pump(end)
    }

    func close(_ handle: IOHandle) {
        switch descriptors.removeValue(forKey: handle) {
        case .endpoint(let end):
            // What came and was not read tells the peer that it was lost.
            let losesData = !end.inbound.isEmpty && !end.isShutDown
            shutdown(end)
            if let peer = end.peer {
                if losesData { arrive(at: peer) { $0.isReset = true } }
                peer.peer = nil
                // Its waiting sends have nobody to send to.
                pump(peer)
            }
        case .listening(let socket):
            if listeners[socket.address] === socket { listeners[socket.address] = nil }
            for end in socket.backlog {
                if let peer = end.peer { arrive(at: peer) { $0.isReset = true } }
            }
        case .unconnected, nil: break
        }
    }

    // MARK: Operations

    func submit(_ operation: IOOperation, _ token: IOToken) {
        let (_, handle) = operation.kindAndHandle
        switch (operation, descriptors[handle]) {
        case (.receive(_, let vector), .endpoint(let end)):
            end.receives.append((token, vector))
            pump(end)
        case (.awaitReadable, .endpoint(let end)):
            end.receives.append((token, nil))
            pump(end)
        case (.awaitTaken, .endpoint): complete(token, 0)
        case (.send(_, let vector), .endpoint(let end)):
            end.sends.append((token, vector))
            pump(end)
        case (.accept, .listening(let socket)):
            if socket.isShutDown { return complete(token, -Int(EINVAL)) }
            socket.accepts.append(token)
            pump(socket)
        case (.awaitReadable, .listening(let socket)):
            socket.readables.append(token)
            pump(socket)
        case (.connect(_, let address), .unconnected): connect(handle, address, token)
        case (_, nil): complete(token, -Int(EBADF))
        default: complete(token, -Int(ENOTCONN))
        }
    }

    private func connect(_ handle: IOHandle, _ address: SocketAddress, _ token: IOToken) {
        let time = latency
        engine?.at(time) { [self] in
            guard let listener = listeners[address], !listener.isShutDown else {
                var error = ECONNREFUSED
                if case .unix(let path, abstract: false) = address, !names.contains(path) {
                    error = ENOENT
                }
                return complete(token, -Int(error), after: 0)
            }
            let near = Endpoint(.unix(path: ""))
            let far = Endpoint(address)
            near.peer = far
            far.peer = near
            descriptors[handle] = .endpoint(near)
            listener.backlog.append(far)
            complete(token, 0, after: 0)
            pump(listener)
        }
    }

    private func pump(_ socket: ListeningSocket) {
        while !socket.backlog.isEmpty, !socket.accepts.isEmpty {
            let handle = files.nextHandle()
            descriptors[handle] = .endpoint(socket.backlog.removeFirst())
            complete(socket.accepts.removeFirst(), Int(handle.rawValue))
        }
        if !socket.backlog.isEmpty {
            for token in socket.readables { complete(token, 0) }
            socket.readables = []
        }
    }

    /// Completes what can be completed of an end's operations.
    private func pump(_ end: Endpoint) {
        while let first = end.receives.first, end.isReadable {
            end.receives.removeFirst()
            complete(first.token, first.vector.map { receive(end, $0) } ?? 0)
        }
        while let first = end.sends.first, let result = send(end, first.vector) {
            end.sends.removeFirst()
            complete(first.token, result)
        }
    }

    func receiveNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        guard case .endpoint(let end) = descriptors[handle], end.isReadable, end.receives.isEmpty
        else { return nil }
        return receive(end, vector)
    }

    func sendNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        guard case .endpoint(let end) = descriptors[handle], end.sends.isEmpty else { return nil }
        return send(end, vector)
    }

    /// The end is readable.
    private func receive(_ end: Endpoint, _ vector: IOVector) -> Int {
        if end.isShutDown { return 0 }
        if end.inbound.isEmpty { return end.isReset ? -Int(ECONNRESET) : 0 }
        let count = cut(min(vector.count, end.inbound.count))
        vector.copy(from: Array(end.inbound.prefix(count)))
        end.inbound.removeFirst(count)
        simulation.note("receive", count)
        // There is room for what the other end waits to send.
        if let peer = end.peer { pump(peer) }
        return count
    }

    /// - Returns: `nil` when nothing fits.
    private func send(_ end: Endpoint, _ vector: IOVector) -> Int? {
        guard !end.isShutDown, !end.isReset, let peer = end.peer, !peer.isShutDown else {
            return -Int(end.isReset ? ECONNRESET : EPIPE)
        }
        let room = simulation.options.socketBufferBytes - peer.inbound.count - peer.underwayCount
        guard room > 0 || vector.isEmpty else { return nil }
        let count = cut(min(room, vector.count))
        let bytes = vector.slice(0, count).array
        peer.underwayCount += count
        simulation.note("send", count)
        // They arrive in up to three parts.
        var start = 0
        while start < count {
            let part = start + 1 + simulation.random.below(count - start)
            let end = simulation.random.chance(500) ? count : part
            let slice = bytes[start..<end]
            arrive(at: peer) {
                $0.underwayCount -= slice.count
                $0.inbound += slice
            }
            start = end
        }
        return count
    }

    private func cut(_ count: Int) -> Int {
        guard count > 1, simulation.random.chance(simulation.options.shortPerMille) else {
            return count
        }
        return 1 + simulation.random.below(count - 1)
    }

    /// Something gets to `end`, after all that was sent to it before.
    private func arrive(at end: Endpoint, _ effect: @escaping (Endpoint) -> Void) {
        guard let engine else { return }
        let time = max(engine.now &+ latency, end.lastArrival)
        end.lastArrival = time
        engine.at(time &- engine.now) { [self] in
            effect(end)
            pump(end)
        }
    }

    func cancelAll(on handle: IOHandle) {
        var tokens: [IOToken] = []
        switch descriptors[handle] {
        case .endpoint(let end):
            tokens = end.receives.map(\.token) + end.sends.map(\.token)
            end.receives = []
            end.sends = []
        case .listening(let socket):
            tokens = socket.accepts + socket.readables
            socket.accepts = []
            socket.readables = []
        case .unconnected, nil: break
        }
        for token in tokens { complete(token, -Int(ECANCELED)) }
    }
}
