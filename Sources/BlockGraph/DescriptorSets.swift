import BlockCore
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Sets of open files that somebody passed in, for files that this process may not open by itself:
/// opening `/dev/fdset/ID` opens what the member of the set is whose access mode is the one wanted. From any
/// thread.
public final class DescriptorSets: Sendable {
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

    private struct State {
        /// In the order of their identifiers.
        var sets: [Set] = []
        /// By the member's descriptor.
        var loans: [Int32: LoanRecord] = [:]
    }
    private let state = Mutex(State())

    /// In the order of their identifiers.
    public var all: [Set] { state.withLock { $0.sets } }

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
        try state.withLock { state throws(BlockError) in
            let identifier = wanted ?? Self.freeIdentifier(state.sets)
            guard identifier >= 0 else {
                throw BlockError(.invalidArgument, "a set cannot be called \(identifier)")
            }
            let member = Member(descriptor: descriptor, note: note)
            if let place = state.sets.firstIndex(where: { $0.identifier == identifier }) {
                guard state.sets[place].members.count < Self.memberCountMax else {
                    throw BlockError(.exhausted, "the set \(identifier) is full")
                }
                state.sets[place].members.append(member)
            } else {
                guard state.sets.count < Self.setCountMax else {
                    throw BlockError(.exhausted, "there are \(Self.setCountMax) sets already")
                }
                state.sets.append(Set(identifier: identifier, members: [member]))
                state.sets.sort { $0.identifier < $1.identifier }
            }
            return identifier
        }
    }

    private static func freeIdentifier(_ sets: [Set]) -> Int {
        var free = 0
        for set in sets where set.identifier == free { free += 1 }
        return free
    }

    /// Closes one descriptor of a set, or all. Those opened from it stay open.
    public func remove(_ descriptor: Int?, from identifier: Int) throws(BlockError) {
        try state.withLock { state throws(BlockError) in
            guard let place = state.sets.firstIndex(where: { $0.identifier == identifier }) else {
                throw BlockError(.notFound, "there is no set \(identifier)")
            }
            let gone = state.sets[place].members.filter {
                descriptor == nil || Int($0.descriptor) == descriptor
            }
            guard !gone.isEmpty else {
                throw BlockError(
                    .notFound, "the set \(identifier) has no descriptor \(descriptor ?? -1)")
            }
            state.sets[place].members.removeAll { member in
                gone.contains { $0.descriptor == member.descriptor }
            }
            if state.sets[place].members.isEmpty { state.sets.remove(at: place) }
            for member in gone {
                state.loans[member.descriptor] = nil
                close(member.descriptor)
            }
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
    ///
    /// - Throws: `notFound` when the member was removed.
    public func duplicate(_ member: Member, as path: String) throws(BlockError) -> Int32 {
        try state.withLock { state throws(BlockError) in
            try Self.duplicate(member, of: state, as: path)
        }
    }

    private static func duplicate(
        _ member: Member, of state: State, as path: String
    ) throws(BlockError) -> Int32 {
        let isThere = state.sets.contains {
            $0.members.contains { $0.descriptor == member.descriptor }
        }
        guard isThere else { throw BlockError(.notFound, "'\(path)' was removed") }
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
        try state.withLock { state throws(BlockError) in
            guard state.loans[member.descriptor]?.loan == nil else {
                throw BlockError(
                    .busy,
                    "'\(path)' is in use by another node, and this process may not open the file anew",
                    remedy: "pass in an opening of its own for each node")
            }
            let loan = Loan(try Self.duplicate(member, of: state, as: path))
            state.loans[member.descriptor] = LoanRecord(loan: loan)
            return loan
        }
    }
}
