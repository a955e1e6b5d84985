import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Going to the background once everything is ready (`--fork`).
///
/// A Swift process has threads from early on, so that it cannot fork: it starts itself again instead,
/// in a session of its own, and waits for word over a pipe. What was left open for this process is there in
/// the new one, too, until it is ready: the image, or a passphrase, may be in `/dev/fd/9`.
enum Background {
    /// Names the descriptor, in the new process, to say "ready" on.
    private static let variable = "MERINO_READY_DESCRIPTOR"
    /// What a process has open is looked for below this.
    private static let descriptorsMax: Int32 = 4096
    /// `POSIX_SPAWN_SETSID` of spawn.h, which the C library declares for _GNU_SOURCE only.
    #if os(Linux)
    private static let newSession: Int16 = 0x80
    #else
    private static let newSession: Int16 = 0x400
    #endif

    /// Whether this is the process in the background already.
    static var isChild: Bool { getenv(variable) != nil }

    /// Starts this command again in the background and ends this process when that one is ready.
    ///
    /// - Throws: when the new process cannot be started. When it ends before it is ready, this one
    ///   ends with exit code 1: the other has said why.
    static func start() throws(BlockError) -> Never {
        fillStandardStreams()
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { throw .system("cannot make a pipe", errno) }
        // The other end goes on with the new process, under its number.
        _ = fcntl(ends[0], F_SETFD, FD_CLOEXEC)

        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        posix_spawnattr_setflags(&attributes, newSession)
        setenv(variable, String(ends[1]), 1)

        var process = pid_t()
        var arguments = CommandLine.arguments.map { strdup($0) } + [nil]
        let failure = posix_spawn(
            &process, "/proc/self/exe", nil, &attributes, &arguments, environ)
        guard failure == 0 else { throw .system("cannot start in the background", failure) }
        close(ends[1])
        var byte: UInt8 = 0
        var count = 0
        repeat { count = read(ends[0], &byte, 1) } while count < 0 && errno == EINTR
        end(count == 1 ? 0 : 1)
    }

    /// Whatever is opened next would get the number of a standard stream that is closed, and be taken for it.
    private static func fillStandardStreams() {
        while true {
            let null = open("/dev/null", O_RDWR)
            guard null >= 0, null <= 2 else {
                if null > 2 { close(null) }
                return
            }
        }
    }

    private static var readyDescriptor: Int32? {
        getenv(variable).flatMap { Int32(String(cString: $0)) }
    }

    /// In the background: what the process was started with beside its standard streams. To be called before
    /// it opens anything that is to stay.
    static func inheritedDescriptors() -> [Int32] {
        guard let ready = readyDescriptor else { return [] }
        return (3..<descriptorsMax).filter { descriptor in
            let flags = fcntl(descriptor, F_GETFD)
            return flags >= 0 && flags & FD_CLOEXEC == 0 && descriptor != ready
        }
    }

    /// In the background: lets go of the terminal, of the folder it was started in, which may be wanted for
    /// something else, and of `inherited`, which nobody expects to be held there; then tells the process
    /// that waits.
    static func ready(closing inherited: [Int32]) throws(BlockError) {
        guard let readyDescriptor else { return }
        guard chdir("/") == 0 else { throw .system("cannot change to '/'", errno) }
        for descriptor in inherited { close(descriptor) }
        let null = open("/dev/null", O_RDWR)
        if null >= 0 {
            for descriptor: Int32 in 0...2 { dup2(null, descriptor) }
            close(null)
        }
        var byte: UInt8 = 1
        _ = write(readyDescriptor, &byte, 1)
        close(readyDescriptor)
        unsetenv(variable)
    }
}
