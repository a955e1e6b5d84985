import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// What a service manager such as systemd and a service tell each other: sd_listen_fds(3) and
/// sd_notify(3).
public enum ServiceManager {
    /// A listening socket, or another open file, that was handed over.
    public struct Inherited: Sendable, Equatable {
        public let descriptor: Int32
        /// As the manager's configuration names it (`FileDescriptorName=`); empty without one.
        public let name: String
    }

    private static let descriptorFirst: Int32 = 3
    private static let descriptorCountMax: Int32 = 64

    /// Whether something was handed over to this process that has not been taken.
    public static var hasDescriptors: Bool {
        guard let process = variable("LISTEN_PID"), variable("LISTEN_FDS") != nil else {
            return false
        }
        return pid_t(process) == getpid()
    }

    /// What was handed over: `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`; nothing when it is meant for
    /// another process. Takes the variables away, so that no process started from here believes in
    /// them. Before the process goes to the background, for it has another number then.
    ///
    /// - Throws: when the variables make no sense.
    public static func takeDescriptors() throws(BlockError) -> [Inherited] {
        guard let process = variable("LISTEN_PID"), let count = variable("LISTEN_FDS") else {
            return []
        }
        guard pid_t(process) == getpid() else { return [] }
        let names =
            variable("LISTEN_FDNAMES")?
            .split(separator: ":", omittingEmptySubsequences: false).map(String.init) ?? []
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] { unsetenv(name) }
        guard let number = Int32(count), number >= 0, number <= descriptorCountMax else {
            throw BlockError(.invalidArgument, "LISTEN_FDS is '\(count)'")
        }
        return (0..<number).map { index in
            let descriptor = descriptorFirst + index
            _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
            let place = Int(index)
            return Inherited(
                descriptor: descriptor, name: place < names.count ? names[place] : "")
        }
    }

    /// Tells the manager how the service is, where one wants to hear it (`NOTIFY_SOCKET`): lines of
    /// `NAME=value`, such as `READY=1`.
    ///
    /// A manager that does not listen changes nothing for the service.
    public static func notify(_ state: String) {
        guard let path = variable("NOTIFY_SOCKET"), path.hasPrefix("/") || path.hasPrefix("@"),
            path.utf8.count < MemoryLayout.size(ofValue: sockaddr_un().sun_path)
        else { return }
        #if canImport(Glibc)
        let kind = Int32(SOCK_DGRAM.rawValue)
        #else
        let kind = SOCK_DGRAM
        #endif
        let descriptor = socket(AF_UNIX, kind, 0)
        guard descriptor >= 0 else { return }
        defer { close(descriptor) }
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        // A name that begins with @ is abstract: a zero byte stands for it, and its length ends it.
        if path.hasPrefix("@") { address.sun_path.0 = 0 }
        let start = MemoryLayout<sockaddr_un>.offset(of: \.sun_path) ?? 2
        let length = socklen_t(start + path.utf8.count)
        var bytes = Array(state.utf8)
        _ = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                sendto(descriptor, &bytes, bytes.count, 0, $0, length)
            }
        }
    }

    private static func variable(_ name: String) -> String? {
        getenv(name).map { String(cString: $0) }
    }
}
