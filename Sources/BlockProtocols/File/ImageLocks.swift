import BlockCore
import BlockGraph
import BlockIO

/// Locks that tell other processes how an image is used, compatible with QEMU's.
///
/// Each permission has two lock bytes in the file: one held by those who use the permission, one held
/// by those who do not let others use it. All are held as shared open-file-description locks, so that
/// holders of one byte live beside each other; who wants the permission checks that nobody holds the
/// other byte.
///
/// Layout: byte `100 + bit` is "uses", byte `200 + bit` is "does not share".
///
/// A change has two steps, like the permissions of the graph: `prepare` takes what the new access
/// needs on top and checks it against others, `commit` drops what is not needed any more, `abort`
/// goes back.
final class ImageLocks {
    private static let usesBase = 100
    private static let unsharedBase = 200

    private var file: File
    /// The file is about to be made anew.
    private let isForCreation: Bool
    /// Locks were asked for by name: doing without is an error.
    var required: Bool
    private var isSupported = true
    private var current = Access.none
    private var pending: Access?

    init(_ file: File, required: Bool, isForCreation: Bool = false) {
        self.file = file
        self.required = required
        self.isForCreation = isForCreation
    }

    // MARK: Holders that are gone

    /// The time that the system takes to end what a process had under way when it was killed: with
    /// io_uring it goes on after that process is gone, and keeps its files open.
    private static let endNanoseconds: UInt64 = 10_000_000
    private static let endCountMax = 20

    /// Waits a short while for locks that are in the way and whose holder cannot be seen.
    ///
    /// - Parameter writing: the image is to be written.
    func waitForEndedHolders(writing: Bool) async {
        guard let byte = byteInTheWay(writing: writing) else { return }
        let (system, handle) = (file.thread.system, file.handle)
        let holders = await file.thread.offload {
            system.holders(ofLock: byte, besides: handle)
        }
        guard holders.isEmpty else { return }
        for _ in 0..<Self.endCountMax {
            await file.thread.sleep(nanoseconds: Self.endNanoseconds)
            if byteInTheWay(writing: writing) == nil { return }
        }
    }

    /// Of those that stand against what images are mostly opened for: to be read without being written
    /// meanwhile, and to be written.
    private func byteInTheWay(writing: Bool) -> Int? {
        for (index, entry) in Permission.each.enumerated() {
            switch entry.permission {
            case .write:
                if isHeld(Self.usesBase + index) { return Self.usesBase + index }
                if writing, isHeld(Self.unsharedBase + index) { return Self.unsharedBase + index }
            case .consistentRead:
                if isHeld(Self.unsharedBase + index) { return Self.unsharedBase + index }
            default: break
            }
        }
        return nil
    }

    private func isHeld(_ byte: Int) -> Bool {
        // Where locks cannot be had, whoever takes them says so.
        do throws(BlockError) {
            return try !file.canLock(ByteRange(byte, 1), .exclusive)
        } catch { return false }
    }

    // MARK: Changes

    func prepare(_ access: Access) throws(BlockError) {
        guard isSupported else { return }
        do throws(BlockError) {
            pending = access
            try take(
                uses: access.uses.subtracting(current.uses),
                unshared: current.shares.subtracting(access.shares))
            try checkOthers(access)
        } catch {
            abort()
            if error.code == .unsupported || error.code == .invalidArgument, !required {
                // A file system without locks.
                isSupported = false
                return
            }
            throw error
        }
    }

    func commit(_ access: Access) {
        guard isSupported, pending != nil else { return }
        pending = nil
        drop(
            uses: current.uses.subtracting(access.uses),
            unshared: access.shares.subtracting(current.shares))
        current = access
    }

    func abort() {
        guard isSupported, let pending else { return }
        self.pending = nil
        drop(
            uses: pending.uses.subtracting(current.uses),
            unshared: current.shares.subtracting(pending.shares))
    }

    /// Holds on `other`, another opening of the same file, what is held on the one before.
    ///
    /// Nobody can have gained a lock that excludes these: both openings share them until the old one is
    /// closed. That the system has no room for locks is all that could get in the way, and then the
    /// image is no less open.
    func move(to other: File) {
        let old = file
        file = other
        guard isSupported else { return }
        let unshared = Permission.all.subtracting(current.shares)
        try? take(uses: current.uses, unshared: unshared)
        Self.drop(uses: current.uses, unshared: unshared, on: old)
    }

    /// Lets go of everything.
    func release() {
        drop(uses: current.uses, unshared: Permission.all.subtracting(current.shares))
        current = .none
    }

    private func take(uses: Permission, unshared: Permission) throws(BlockError) {
        for (index, entry) in Permission.each.enumerated() {
            if uses.contains(entry.permission) {
                try takeByte(Self.usesBase + index, entry.name)
            }
            if unshared.contains(entry.permission) {
                try takeByte(Self.unsharedBase + index, entry.name)
            }
        }
    }

    private func takeByte(_ byte: Int, _ name: String) throws(BlockError) {
        guard try file.lock(ByteRange(byte, 1), .shared) else {
            throw refused(byte, "its '\(name)' lock is held alone by")
        }
    }

    private func drop(uses: Permission, unshared: Permission) {
        Self.drop(uses: uses, unshared: unshared, on: file)
    }

    private static func drop(uses: Permission, unshared: Permission, on file: File) {
        for (index, entry) in Permission.each.enumerated() {
            // Letting go of a lock that is held cannot fail.
            if uses.contains(entry.permission) {
                _ = try? file.lock(ByteRange(usesBase + index, 1), .none)
            }
            if unshared.contains(entry.permission) {
                _ = try? file.lock(ByteRange(unsharedBase + index, 1), .none)
            }
        }
    }

    /// Nobody may hold the byte that contradicts ours.
    private func checkOthers(_ access: Access) throws(BlockError) {
        for (index, entry) in Permission.each.enumerated() {
            if access.uses.contains(entry.permission) {
                try checkByte(
                    Self.unsharedBase + index, "'\(entry.name)' is not shared by")
            }
            if !access.shares.contains(entry.permission) {
                try checkByte(Self.usesBase + index, "its '\(entry.name)' lock is held by")
            }
        }
    }

    private func checkByte(_ byte: Int, _ conflict: String) throws(BlockError) {
        guard try file.canLock(ByteRange(byte, 1), .exclusive) else {
            throw refused(byte, conflict)
        }
    }

    private func refused(_ byte: Int, _ conflict: String) -> BlockError {
        let holders = file.thread.system.holders(ofLock: byte, besides: file.handle)
        let names = holders.map {
            switch $0 {
            case .thisProcess: "another node of this process"
            case .process(let name): name
            }
        }
        let who =
            names.isEmpty
            ? "another process (which one cannot be seen)" : names.joined(separator: ", ")
        return BlockError(
            .permissionDenied, "'\(file.path)' is in use: \(conflict) \(who)",
            remedy: remedy(holders))
    }

    private func remedy(_ holders: [LockHolder]) -> String {
        let end = holders == [.thisProcess] ? "remove that node" : "stop that process"
        if isForCreation { return "\(end), or choose another name" }
        let writes = pending?.uses.isDisjoint(with: [.write, .resize]) == false
        return end + (writes ? ", or, to read the image meanwhile," : ", or")
            + " open it with read-only=on and force-share=on"
    }
}
