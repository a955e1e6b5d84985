import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The file of a temporary image: one that was not there before, nor a link to another, and that only its
/// owner may read.
struct FleeceFile {
    let path: String

    /// - Throws: `alreadyExists` where something has that name.
    init(making path: String, for owner: FleeceSession.Owner?) throws(BlockError) {
        self.path = path
        let descriptor = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else {
            if errno == EEXIST {
                throw BlockError(
                    .alreadyExists, "the temporary image '\(path)' is there already",
                    remedy: "name a file that is not, or remove it")
            }
            throw .system("cannot create the temporary image '\(path)'", errno)
        }
        defer { close(descriptor) }
        if let owner, fchown(descriptor, owner.user, owner.group) != 0 {
            let failure = errno
            remove()
            throw .system("cannot give the temporary image '\(path)' to the daemon", failure)
        }
    }

    func setSize(_ size: Int) throws(BlockError) {
        guard truncate(path, off_t(size)) == 0 else {
            throw .system("cannot set the size of the temporary image '\(path)'", errno)
        }
    }

    func remove() {
        unlink(path)
    }
}
