import BlockCore
import BlockIO
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// QMP on any number of sockets, with any number of clients on each. Confined to its thread.
public final class MonitorServer: @unchecked Sendable {
    /// Clients at a time, over all sockets.
    static let clientCountMax = 256

    private let daemon: StorageDaemon
    private let thread: IOThread
    private var listeners: [Listener] = []
    private var connections: [MonitorConnection] = []
    private var isStopped = false
    private let left = WakeUp()

    public init(for daemon: StorageDaemon) {
        self.daemon = daemon
        thread = daemon.thread
        daemon.emit = { [weak self] name, data in self?.broadcast(name, data) }
    }

    /// Serves the clients that come to `listener`.
    public func listen(on listener: Listener, isPretty: Bool) {
        listeners.append(listener)
        let thread = thread
        thread.spawn { [self] in
            while !isStopped {
                do throws(BlockError) {
                    guard let socket = try await listener.accept() else { return }
                    serve(socket, isPretty: isPretty)
                } catch {
                    // Out of descriptors, say: the clients that are there go on.
                    await thread.sleep(nanoseconds: 100_000_000)
                }
            }
        }
    }

    /// Serves one client.
    public func serve(_ socket: Socket, isPretty: Bool) {
        var channel: any MonitorChannel = socket
        #if os(Linux)
        if case .unix? = try? thread.system.localAddress(of: socket.handle) {
            channel = PassingChannel(socket)
        }
        #endif
        serve(channel, isPretty: isPretty)
    }

    func serve(_ channel: any MonitorChannel, isPretty: Bool) {
        guard !isStopped, connections.count < Self.clientCountMax else { return channel.close() }
        let connection = MonitorConnection(channel, daemon: daemon, isPretty: isPretty)
        connections.append(connection)
        thread.spawn { [self] in
            await connection.run()
            connections.removeAll { $0 === connection }
            left.wake()
        }
    }

    /// Takes no further clients.
    public func stopListening() {
        isStopped = true
        for listener in listeners { listener.close() }
        listeners = []
    }

    /// Lets running commands end and replies leave, then closes all connections.
    ///
    /// - Parameter seconds: clients that have not taken their replies by then are cut off.
    public func stop(withinSeconds seconds: UInt64 = 2) async {
        stopListening()
        for connection in connections { connection.end() }
        let thread = thread
        thread.spawn { [self] in
            await thread.sleep(nanoseconds: seconds * 1_000_000_000)
            for connection in connections { connection.abort() }
        }
        while !connections.isEmpty { await left.wait() }
    }

    private func broadcast(_ name: String, _ data: JSONValue) {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        let microseconds = Int(time.tv_sec) * 1_000_000 + Int(time.tv_nsec) / 1000
        for connection in connections {
            connection.sendEvent(name, data, microseconds: microseconds)
        }
    }
}
