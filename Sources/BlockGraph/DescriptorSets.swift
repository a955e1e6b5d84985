import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Sets of open files that somebody passed in, for files that this process may not open by itself:
/// opening `/dev/fdset/ID` opens what the member of the set is whose access mode is the one wanted.
/// Confined to the graph's thread.
public final class DescriptorSets: @unchecked Sendable {
    public struct Member: Sendable {
        public let descriptor: Int32
        /// What whoever passed it wrote to it.
        public let note: String?
    }
    public struct Set: Sendable {
        public let identifier: Int
        public fileprivate(set) var members: [Member]
    }

    static let setCountMax = 1024
    static let memberCountMax = 64
    private static let prefix = "/dev/fdset/"

    /// In the order of their identifiers.
    public private(set) var all: [Set] = []
    /// By the member's descriptor.
    private var loans: [Int32: LoanRecord] = [:]

    init() {}

    deinit {
        for set in all {
            for member in set.members { close(member.descriptor) }
        }
    }

    /// Takes a descriptor over, into a set, or into a new one.
    ///
    /// - Returns: the set's identifier.
    public func add(
        _ descriptor: Int32, to wanted: Int?, note: String?
    ) throws(BlockError) -> Int {
        let identifier = wanted ?? freeIdentifier
        guard identifier >= 0 else {
            throw BlockError(.invalidArgument, "a set cannot be called \(identifier)")
        }
        let member = Member(descriptor: descriptor, note: note)
        if let place = all.firstIndex(where: { $0.identifier == identifier }) {
            guard all[place].members.count < Self.memberCountMax else {
                throw BlockError(.exhausted, "the set \(identifier) is full")
            }
            all[place].members.append(member)
        } else {
            guard all.count < Self.setCountMax else {
                throw BlockError(.exhausted, "there are \(Self.setCountMax) sets already")
            }
            all.append(Set(identifier: identifier, members: [member]))
            all.sort { $0.identifier < $1.identifier }
        }
        return identifier
    }

    private var freeIdentifier: Int {
        var free = 0
        for set in all where set.identifier == free { free += 1 }
        return free
    }

    /// Closes one descriptor of a set, or all. Those opened from it stay open.
    public func remove(_ descriptor: Int?, from identifier: Int) throws(BlockError) {
        guard let place = all.firstIndex(where: { $0.identifier == identifier }) else {
            throw BlockError(.notFound, "there is no set \(identifier)")
        }
        let gone = all[place].members.filter {
            descriptor == nil || Int($0.descriptor) == descriptor
        }
        guard !gone.isEmpty else {
            throw BlockError(
                .notFound, "the set \(identifier) has no descriptor \(descriptor ?? -1)")
        }
        all[place].members.removeAll { member in
            gone.contains { $0.descriptor == member.descriptor }
        }
        if all[place].members.isEmpty { all.remove(at: place) }
        for member in gone {
            loans[member.descriptor] = nil
            close(member.descriptor)
        }
    }

    /// The member of the set that a path names; `nil` for every path that names none.
    ///
    /// - Throws: `notFound` for a set that is not there, `permissionDenied` where no member has the
    ///   mode that is wanted.
    public func find(_ path: String, writable: Bool) throws(BlockError) -> Member? {
        guard path.hasPrefix(Self.prefix) else { return nil }
        let name = path.dropFirst(Self.prefix.count)
        guard let set = all.first(where: { String($0.identifier) == name }) else {
            throw BlockError(
                .notFound, "there is no set '\(path)'", remedy: "add-fd makes one")
        }
        let wanted = writable ? O_RDWR : O_RDONLY
        guard
            let member = set.members.first(where: {
                fcntl($0.descriptor, F_GETFL) & O_ACCMODE == wanted
            })
        else {
            throw BlockError(
                .permissionDenied,
                "'\(path)' holds nothing that was opened \(writable ? "to be written" : "read-only")",
                remedy: "add-fd one")
        }
        return member
    }

    /// A descriptor of the caller's own; it shares the member's open file description.
    public func duplicate(_ member: Member, as path: String) throws(BlockError) -> Int32 {
        let copy = fcntl(member.descriptor, F_DUPFD_CLOEXEC, 0)
        guard copy >= 0 else { throw .system("cannot use '\(path)'", errno) }
        return copy
    }

    // MARK: Loans

    /// A duplicate of a member, whose open file description it shares; lent to one user at a time.
    /// Whoever has it closes the descriptor, and then lets go of the loan.
    public final class Loan: Sendable {
        public let descriptor: Int32
        fileprivate init(_ descriptor: Int32) { self.descriptor = descriptor }
    }

    private struct LoanRecord {
        weak var loan: Loan?
    }

    /// - Throws: `busy` while somebody has it, `notFound` when it was removed.
    public func borrow(_ member: Member, as path: String) throws(BlockError) -> Loan {
        guard all.contains(where: { $0.members.contains { $0.descriptor == member.descriptor } })
        else { throw BlockError(.notFound, "'\(path)' was removed") }
        guard loans[member.descriptor]?.loan == nil else {
            throw BlockError(
                .busy,
                "'\(path)' is in use by another node, and this process may not open the file anew",
                remedy: "pass in an opening of its own for each node")
        }
        let loan = Loan(try duplicate(member, as: path))
        loans[member.descriptor] = LoanRecord(loan: loan)
        return loan
    }
}
