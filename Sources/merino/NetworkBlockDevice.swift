import BlockCore
import BlockExports
import BlockIO

#if os(Linux)
import CLinux
import Glibc
#elseif canImport(Darwin)
import Darwin
#endif

/// A block device of Linux's nbd module, `/dev/nbdN`: the kernel is the client of an NBD server, over a
/// socket that a process hands to it (ioctl_nbd in linux/nbd.h). Confined to its thread.
final class NetworkBlockDevice: @unchecked Sendable {
    private let path: String
    private let descriptor: Int32
    private let thread: IOThread
    private var isAttached = false

    /// - Throws: `notFound` where the module is not loaded.
    init(_ path: String, on thread: IOThread) throws(BlockError) {
        self.path = path
        self.thread = thread
        descriptor = try Self.open(path)
    }

    deinit {
        close(descriptor)
    }

    private static func open(_ path: String) throws(BlockError) -> Int32 {
        #if os(Linux)
        let descriptor = Glibc.open(path, O_RDWR | O_CLOEXEC)
        guard descriptor >= 0 else {
            let failure = errno
            if failure == ENOENT || failure == ENXIO {
                throw BlockError(
                    .notFound, "there is no device '\(path)'",
                    remedy: "load the kernel's module: modprobe nbd", systemError: failure)
            }
            throw .system("cannot open '\(path)'", failure)
        }
        return descriptor
        #else
        throw BlockError(.unsupported, "network block devices are Linux's")
        #endif
    }

    /// Ends the connection of a device, whoever made it.
    static func disconnect(_ path: String) throws(BlockError) {
        let descriptor = try open(path)
        defer { close(descriptor) }
        #if os(Linux)
        guard linux_nbd_detach(descriptor) == 0 else {
            throw .system("cannot disconnect '\(path)'", errno)
        }
        #endif
        StandardOutput.print("\(path) disconnected\n")
    }

    /// Makes the device a client of `server`. When the kernel ends the connection, the client leaves.
    func attach(to server: NBDServer, _ exportName: String) async throws(BlockError) {
        #if os(Linux)
        var ends: [Int32] = [-1, -1]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0 else {
            throw .system("cannot make a pair of sockets", errno)
        }
        for end in ends { try thread.system.adopt(IOHandle(end)) }
        server.serve(Socket(IOHandle(ends[0]), on: thread))
        let client = Socket(IOHandle(ends[1]), on: thread)
        // The kernel has its own reference; ours goes when it has begun.
        defer { client.close() }
        let session = try await NBDRemoteServer.use(exportName, on: client)
        guard session.mode == .simple, let details = session.export.details else {
            throw BlockError(.protocolViolation, "the kernel knows simple replies only")
        }
        let block = details.blockSizes?.minimum ?? 1
        let attached = linux_nbd_attach(
            descriptor, ends[1], details.size, max(512, block), UInt32(details.flags.rawValue))
        guard attached == 0 else {
            throw .system("cannot connect '\(path)'", errno)
        }
        isAttached = true
        let descriptor = descriptor
        thread.spawn { [self] in
            // For as long as the device is connected: a worker of its own.
            await thread.offload { _ = linux_nbd_run(descriptor) }
            isAttached = false
        }
        #endif
    }

    /// Ends the connection: what was written has reached the server by then.
    func detach() async {
        #if os(Linux)
        guard isAttached else { return }
        let descriptor = descriptor
        await thread.offload { _ = linux_nbd_detach(descriptor) }
        #endif
    }
}
