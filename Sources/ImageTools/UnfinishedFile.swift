import BlockCore
import BlockIO
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A new image while it is being made: under another name, so that what an interruption leaves never
/// looks whole.
///
/// The image is written to `NAME.partial` beside the target and takes the target's name, replacing an
/// image of that name, when all of it is there. A failure or a signal removes it; after SIGKILL or a
/// power failure the name says what it is, and the next conversion to the same target overwrites it.
/// Targets that a name cannot stand in for are written in place: devices, files with several
/// names, folders where no file can be made. Of these, regular files are cut to nothing on failure.
///
/// Safe from any thread: a signal may end the work at any moment.
public final class UnfinishedFile: Sendable {
    private enum State {
        case none
        /// Its path, and a descriptor that keeps other conversions from it.
        case partial(String, Int32)
        case inPlace(String)
    }

    private static let suffix = ".partial"
    private let state = Mutex(State.none)

    public init() {}

    /// What stands there.
    private struct Place {
        var path: String
        var mode: mode_t?
        var owner: (user: uid_t, group: gid_t)?
        var isReplaceable: Bool
    }

    /// The path to write the image to, instead of `target`.
    ///
    /// - Parameter target: a path, or a name with a protocol, which is left alone.
    func begin(_ target: String) throws(BlockError) -> String {
        let plain = target.hasPrefix("file:") ? String(target.dropFirst(5)) : target
        if target == plain, ImageName.hasProtocol(target) { return target }
        guard !plain.isEmpty, !plain.utf8.contains(0) else {
            throw BlockError(.invalidArgument, "the target's name is empty or holds a zero byte")
        }
        let place = Self.place(plain)
        let partial = place.path + Self.suffix
        let descriptor =
            place.isReplaceable ? open(partial, O_RDWR | O_CREAT | O_CLOEXEC, 0o644) : -1
        guard descriptor >= 0 else {
            state.withLock { $0 = .inPlace(plain) }
            return plain
        }
        guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
            _ = close(descriptor)
            throw BlockError(
                .busy, "'\(partial)' is being written by another conversion to the same target")
        }
        state.withLock { $0 = .partial(partial, descriptor) }
        if let owner = place.owner { _ = fchown(descriptor, owner.user, owner.group) }
        if let mode = place.mode { _ = fchmod(descriptor, mode & 0o7777) }
        return partial
    }

    /// Whether the target is written under its own name.
    var isInPlace: Bool {
        state.withLock { state in
            if case .inPlace = state { return true }
            return false
        }
    }

    /// The image is complete: it gets its name. All that must be durable is.
    func commit(to target: String, durably: Bool) throws(BlockError) {
        let ended = state.withLock { state in
            defer { state = .none }
            return state
        }
        guard case .partial(let partial, let lock) = ended else { return }
        defer { _ = close(lock) }
        let path = String(partial.dropLast(Self.suffix.count))
        guard rename(partial, path) == 0 else {
            let failure = errno
            _ = unlink(partial)
            throw .system("cannot rename '\(partial)' to '\(path)'", failure)
        }
        guard durably else { return }
        let folder = path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
        let descriptor = open(folder, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return }
        defer { _ = close(descriptor) }
        guard fsync(descriptor) == 0 else { throw .system("cannot sync '\(folder)'", errno) }
    }

    /// Takes away what there is so far. From any thread, more than once.
    public func discard() {
        let ended = state.withLock { state in
            defer { state = .none }
            return state
        }
        switch ended {
        case .none: break
        case .partial(let path, let lock):
            _ = unlink(path)
            _ = close(lock)
        case .inPlace(let path): Self.cut(path)
        }
    }

    /// A regular file that is written in place must not look whole. Devices stay as they are.
    private static func cut(_ path: String) {
        var info = stat()
        guard stat(path, &info) == 0, info.st_mode & S_IFMT == S_IFREG else { return }
        _ = truncate(path, 0)
    }

    private static func place(_ path: String) -> Place {
        var info = stat()
        guard lstat(path, &info) == 0 else {
            return Place(path: path, mode: nil, owner: nil, isReplaceable: true)
        }
        var real = path
        if info.st_mode & S_IFMT == S_IFLNK {
            // A link stays one: the file that it leads to is replaced.
            guard let resolved = realpath(path, nil) else {
                return Place(path: path, mode: nil, owner: nil, isReplaceable: false)
            }
            real = String(cString: resolved)
            free(resolved)
            guard stat(real, &info) == 0 else {
                return Place(path: path, mode: nil, owner: nil, isReplaceable: false)
            }
        }
        return Place(
            path: real, mode: info.st_mode, owner: (info.st_uid, info.st_gid),
            isReplaceable: info.st_mode & S_IFMT == S_IFREG && info.st_nlink == 1)
    }
}
