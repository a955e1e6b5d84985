#if os(Linux)
import BlockCore
import CLinux
import Glibc

/// Going to the background: the parent waits until the child is ready, and ends as it went.
public struct Daemonization: Sendable {
    private let pipe: Int32

    /// Continues in a child of its own session. Call it before any thread is started.
    ///
    /// The parent never returns: it exits with 0 when the child is ready, with 1 when it ends before.
    public static func begin() throws(BlockError) -> Daemonization {
        var ends: (Int32, Int32) = (-1, -1)
        let made = withUnsafeMutableBytes(of: &ends) {
            Glibc.pipe($0.assumingMemoryBound(to: Int32.self).baseAddress)
        }
        guard made == 0 else { throw .system("cannot make a pipe", errno) }
        let child = linux_fork()
        guard child >= 0 else { throw .system("cannot start a process", errno) }
        if child > 0 {
            close(ends.1)
            var byte: UInt8 = 0
            while true {
                let count = read(ends.0, &byte, 1)
                if count < 0, errno == EINTR { continue }
                _exit(count == 1 ? 0 : 1)
            }
        }
        close(ends.0)
        _ = fcntl(ends.1, F_SETFD, FD_CLOEXEC)
        setsid()
        return Daemonization(pipe: ends.1)
    }

    /// Lets go of the terminal and tells the parent.
    public func ready() throws(BlockError) {
        guard chdir("/") == 0 else { throw .system("cannot change to '/'", errno) }
        let null = open("/dev/null", O_RDWR | O_CLOEXEC)
        guard null >= 0 else { throw .system("cannot open '/dev/null'", errno) }
        for descriptor in [Int32(0), 1, 2] { dup2(null, descriptor) }
        close(null)
        var byte: UInt8 = 0
        _ = Glibc.write(pipe, &byte, 1)
        close(pipe)
    }
}
#endif
