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
/// The image is written to `NAME.merino-partial` beside the target and takes the target's name, replacing an
/// image of that name, when all of it is there. A failure or a signal removes it; after SIGKILL or a
/// power failure the name says what it is, and the next conversion to the same target removes it.
/// Targets that a name cannot stand in for are written in place: devices, files with several names, mount
/// points, and files in folders where none can be made or somebody else's not be replaced. Of these,
/// regular files are cut to nothing on failure, if the work had begun to change them.
///
/// Invariants:
/// 1. What is written, renamed or removed on failure is a file that this object made.
/// 2. A file of such a name that was there before is removed only where it can be nothing but a leftover:
///    a regular file of the caller's own, with one name, that nobody has locked and that this process
///    does not use. Another name is taken otherwise: `NAME.merino-partial.2`…
/// 3. Symbolic links of that name are not followed.
///
/// Safe from any thread: a signal may end the work at any moment.
public final class UnfinishedFile: Sendable {
    private enum State {
        case none
        case partial(Partial)
        case inPlace(String, isChanged: Bool)
    }

    private struct Partial {
        var path: String
        /// The name that it gets.
        var target: String
        /// Keeps other conversions from it.
        var descriptor: Int32
        /// Of the file that it replaces.
        var mode: mode_t?
        var owner: (user: uid_t, group: gid_t)?
    }

    /// Nobody else's files are called so.
    private static let suffix = ".merino-partial"
    /// Names that are tried.
    private static let nameCountMax = 9
    /// Leftovers that come and go while one name is tried.
    private static let attemptCountMax = 4
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
    /// - Parameters:
    ///   - target: a path, whatever it looks like.
    ///   - used: files that are not to be touched, under whatever name: the sources.
    /// - Throws: `busy` where another conversion to the same target is under way, or the target is one
    ///   of `used`.
    func begin(
        _ target: String, besides used: Set<FileIdentity> = []
    ) throws(BlockError) -> String {
        guard !target.isEmpty, !target.utf8.contains(0) else {
            throw BlockError(.invalidArgument, "the target's name is empty or holds a zero byte")
        }
        let place = Self.place(target)
        if place.isReplaceable, let partial = try Self.make(for: place, besides: used) {
            state.withLock { $0 = .partial(partial) }
            return partial.path
        }
        guard FileIdentity(ofFileAt: target).map(used.contains) != true else {
            throw BlockError(.busy, "'\(target)' is a source too: it cannot be the target")
        }
        state.withLock { $0 = .inPlace(target, isChanged: false) }
        return target
    }

    /// Makes the file under the first name that is free.
    ///
    /// - Returns: `nil` where no file can be made.
    private static func make(
        for place: Place, besides used: Set<FileIdentity>
    ) throws(BlockError) -> Partial? {
        for number in 1...nameCountMax {
            let path = place.path + suffix + (number == 1 ? "" : ".\(number)")
            for _ in 0..<attemptCountMax {
                // Nobody else reads what its owner alone may read.
                let descriptor = open(
                    path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                    place.mode == nil ? 0o644 : 0o600)
                if descriptor >= 0 {
                    guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
                        // Another conversion took it for a leftover just now.
                        _ = close(descriptor)
                        continue
                    }
                    return Partial(
                        path: path, target: place.path, descriptor: descriptor,
                        mode: place.mode, owner: place.owner)
                }
                guard errno == EEXIST else { return nil }
                guard try removeLeftover(path, besides: used) else { break }
            }
        }
        throw BlockError(
            .busy, "'\(place.path)\(suffix)' and the names after it are taken",
            remedy: "move these files away")
    }

    /// - Returns: `false` where the file is to stay.
    /// - Throws: `busy` for the file of another conversion.
    private static func removeLeftover(
        _ path: String, besides used: Set<FileIdentity>
    ) throws(BlockError) -> Bool {
        // Not to be caught by a pipe that nobody writes.
        let descriptor = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)
        guard descriptor >= 0 else { return errno == ENOENT }
        defer { _ = close(descriptor) }
        var info = stat()
        guard fstat(descriptor, &info) == 0, info.st_mode & S_IFMT == S_IFREG,
            info.st_uid == geteuid(), info.st_nlink == 1,
            !used.contains(FileIdentity(info))
        else { return false }
        guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
            throw BlockError(
                .busy, "'\(path)' is being written by another conversion to the same target")
        }
        guard !isLockedImage(descriptor) else { return false }
        // It may have got its name, or be gone, since it was opened.
        guard isNamed(path, descriptor) else { return true }
        return unlink(path) == 0
    }

    /// Whether a process uses the file as an image: then it holds locks on some of its bytes.
    private static func isLockedImage(_ descriptor: Int32) -> Bool {
        var request = flock()
        request.l_type = Int16(F_WRLCK)
        request.l_whence = Int16(SEEK_SET)
        request.l_start = 0
        request.l_len = 0
        return fcntl(descriptor, F_GETLK, &request) == 0 && request.l_type != Int16(F_UNLCK)
    }

    /// Whether `path` still is the open file's name.
    private static func isNamed(_ path: String, _ descriptor: Int32) -> Bool {
        var named = stat()
        var opened = stat()
        return lstat(path, &named) == 0 && fstat(descriptor, &opened) == 0
            && FileIdentity(named) == FileIdentity(opened)
    }

    /// Whether the target is written under its own name.
    var isInPlace: Bool {
        state.withLock { state in
            if case .inPlace = state { return true }
            return false
        }
    }

    /// The target is about to be changed: from here on a failure leaves nothing that looks whole.
    func willChange() {
        state.withLock { state in
            if case .inPlace(let path, _) = state { state = .inPlace(path, isChanged: true) }
        }
    }

    /// Nothing was changed after all: what stands there is left as it is.
    func didNotChange() {
        state.withLock { state in
            if case .inPlace(let path, _) = state { state = .inPlace(path, isChanged: false) }
        }
    }

    /// The image is complete: it gets its name. All that must be durable is.
    func commit(to target: String, durably: Bool) throws(BlockError) {
        let ended = state.withLock { state in
            defer { state = .none }
            return state
        }
        guard case .partial(let partial) = ended else { return }
        defer { _ = close(partial.descriptor) }
        // A new owner takes set-user bits away: the mode comes second.
        if let owner = partial.owner { _ = fchown(partial.descriptor, owner.user, owner.group) }
        if let mode = partial.mode { _ = fchmod(partial.descriptor, mode & 0o7777) }
        guard rename(partial.path, partial.target) == 0 else {
            let failure = errno
            Self.remove(partial)
            throw .system("cannot rename '\(partial.path)' to '\(partial.target)'", failure)
        }
        guard durably else { return }
        let path = partial.target
        let folder = Self.folder(of: path)
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
        case .partial(let partial):
            Self.remove(partial)
            _ = close(partial.descriptor)
        case .inPlace(let path, let isChanged):
            if isChanged { Self.cut(path) }
        }
    }

    private static func remove(_ partial: Partial) {
        if isNamed(partial.path, partial.descriptor) { _ = unlink(partial.path) }
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
        let isReplaceable =
            info.st_mode & S_IFMT == S_IFREG && info.st_nlink == 1 && !isMountPoint(path)
            && mayRemove(real, info)
        return Place(
            path: real, mode: info.st_mode, owner: (info.st_uid, info.st_gid),
            isReplaceable: isReplaceable)
    }

    /// Refuses what stands there where it can be no image: a pipe, a socket, a folder.
    static func checkKind(_ path: String) throws(BlockError) {
        var info = stat()
        guard stat(path, &info) == 0 else { return }
        let kind: String
        switch info.st_mode & S_IFMT {
        case S_IFREG, S_IFBLK, S_IFCHR: return
        case S_IFIFO: kind = "a pipe"
        case S_IFSOCK: kind = "a socket"
        case S_IFDIR: kind = "a folder"
        default: kind = "no file"
        }
        throw BlockError(
            .invalidArgument, "'\(path)' is \(kind): an image needs a file or a device")
    }

    /// In a folder where everybody may make files, owners alone give theirs up.
    private static func mayRemove(_ path: String, _ info: stat) -> Bool {
        let user = geteuid()
        if user == 0 || info.st_uid == user { return true }
        var folder = stat()
        guard stat(Self.folder(of: path), &folder) == 0 else { return false }
        return folder.st_mode & 0o1000 == 0 || folder.st_uid == user
    }

    private static func folder(of path: String) -> String {
        path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
    }

    /// Whether something is mounted on the file itself, as containers have it. On Linux alone.
    private static func isMountPoint(_ path: String) -> Bool {
        guard let resolved = realpath(path, nil) else { return false }
        let real = String(cString: resolved)
        free(resolved)
        guard let list = fopen("/proc/self/mountinfo", "re") else { return false }
        defer { _ = fclose(list) }
        var line: UnsafeMutablePointer<CChar>?
        var capacity = 0
        defer { free(line) }
        while getline(&line, &capacity, list) > 0, let text = line {
            // The fifth word is the place, with some bytes in octal.
            let words = String(cString: text).split(separator: " ", maxSplits: 5)
            if words.count > 4, unescaped(words[4]) == real { return true }
        }
        return false
    }

    /// A path with `\040` for a space, and so on. proc_pid_mountinfo(5).
    private static func unescaped(_ text: Substring) -> String {
        var bytes: [UInt8] = []
        var rest = text.utf8[...]
        while let byte = rest.popFirst() {
            let digits = rest.prefix(3)
            if byte == UInt8(ascii: "\\"), digits.count == 3,
                let code = UInt8(String(decoding: digits, as: UTF8.self), radix: 8)
            {
                bytes.append(code)
                rest = rest.dropFirst(3)
            } else {
                bytes.append(byte)
            }
        }
        return String(decoding: bytes, as: UTF8.self)
    }
}

extension FileIdentity {
    init(_ info: stat) {
        self.init(device: UInt64(info.st_dev), inode: UInt64(info.st_ino))
    }

    /// - Returns: `nil` where there is none, or no word of it.
    init?(ofFileAt path: String) {
        var info = stat()
        guard stat(path, &info) == 0 else { return nil }
        self.init(info)
    }
}
