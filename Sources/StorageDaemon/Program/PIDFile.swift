import BlockCore
import BlockIO

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The file that says which process the daemon, or a server, is; locked while it lives.
public final class PIDFile: Sendable {
    private let path: String
    private let descriptor: Int32

    /// Creates the file, empty, and locks it.
    ///
    /// - Throws: `busy` when another process has it.
    public init(_ path: String) throws(BlockError) {
        // It is removed after a daemon has left the folder it was started in.
        self.path = WorkingFolder.absolute(path)
        descriptor = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw .system("cannot open the pid file '\(path)'", errno) }
        var lock = flock()
        lock.l_type = Int16(F_WRLCK)
        lock.l_whence = Int16(SEEK_SET)
        guard fcntl(descriptor, F_SETLK, &lock) == 0 else {
            close(descriptor)
            throw BlockError(
                .busy, "the pid file '\(path)' is locked by another process",
                remedy: "is the daemon running already?")
        }
    }

    deinit {
        close(descriptor)
    }

    /// Writes the number of this process and a line feed.
    public func write() throws(BlockError) {
        let text = "\(getpid())\n"
        let count = text.utf8.count
        guard ftruncate(descriptor, 0) == 0, pwrite(descriptor, text, count, 0) == count else {
            throw .system("cannot write the pid file '\(path)'", errno)
        }
    }

    /// Takes the file away, at the end of the process.
    public func remove() {
        unlink(path)
    }
}
