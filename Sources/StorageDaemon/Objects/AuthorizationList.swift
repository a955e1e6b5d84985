import BlockCore
import BlockIO
import QMP
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Who may come in: the first rule that matches a name decides, and where none does the policy.
struct AuthorizationList: Sendable {
    enum Policy: String, Sendable, CaseIterable { case deny, allow }
    enum Format: String, Sendable, CaseIterable { case exact, glob }

    struct Rule: Sendable {
        let match: String
        let policy: Policy
        let format: Format

        init(_ value: JSONValue) throws(BlockError) {
            let reader = try OptionReader(value, of: "a rule")
            match = try reader.required("match")
            guard let policy = try reader.enumeration("policy", as: Policy.self) else {
                throw BlockError(.invalidArgument, "a rule needs 'policy', allow or deny")
            }
            self.policy = policy
            format = try reader.enumeration("format", as: Format.self) ?? .exact
            try reader.finish()
        }

        func matches(_ name: String) -> Bool {
            switch format {
            case .exact: match == name
            case .glob: fnmatch(match, name, 0) == 0
            }
        }
    }

    /// Each client's name is held against all of them.
    static let ruleCountMax = 65_536

    var policy: Policy
    var rules: [Rule]

    /// Reads `policy` and `rules`.
    init(_ reader: OptionReader) throws(BlockError) {
        policy = try reader.enumeration("policy", as: Policy.self) ?? .deny
        rules = []
        let list = try reader.list("rules") ?? []
        guard list.count <= Self.ruleCountMax else {
            throw BlockError(
                .exhausted, "\(reader.subject): more than \(Self.ruleCountMax) rules")
        }
        for value in list { rules.append(try Rule(value)) }
    }

    func allows(_ name: String) -> Bool {
        (rules.first { $0.matches(name) }?.policy ?? policy) == .allow
    }
}

/// An ``AuthorizationList`` that can be replaced while servers ask it.
final class SharedAuthorizationList: Sendable {
    private let list: Mutex<AuthorizationList>

    init(_ list: AuthorizationList) {
        self.list = Mutex(list)
    }

    func allows(_ name: String) -> Bool { list.withLock { $0.allows(name) } }

    func replace(with other: AuthorizationList) { list.withLock { $0 = other } }
}

/// An ``AuthorizationList`` in a file, read again when the file is another one or has changed.
///
/// While it cannot be read, what it said last holds.
final class AuthorizationFile: Sendable {
    static let bytesMax = 4 << 20

    private struct State {
        var list: AuthorizationList
        var stamp: Stamp
    }

    /// Tells one state of a file from the next.
    private struct Stamp: Equatable {
        var inode: UInt64
        var size: Int
        var seconds: Int
        var nanoseconds: Int
    }

    private let path: String
    private let refreshes: Bool
    private let state: Mutex<State>

    /// Blocks; call it on a worker thread.
    init(_ path: String, refreshes: Bool) throws(BlockError) {
        self.path = path
        self.refreshes = refreshes
        let stamp = try Self.stamp(path)
        state = Mutex(State(list: try Self.read(path), stamp: stamp))
    }

    /// Looks at the file first: it is small, and clients come seldom.
    func allows(_ name: String) -> Bool {
        state.withLock { state in
            if refreshes, let stamp = try? Self.stamp(path), stamp != state.stamp,
                let list = try? Self.read(path)
            {
                state = State(list: list, stamp: stamp)
            }
            return state.list.allows(name)
        }
    }

    private static func read(_ path: String) throws(BlockError) -> AuthorizationList {
        let bytes = try SmallFile.read(path, bytesMax: bytesMax)
        do throws(BlockError) {
            let value = try JSONParser.parse(String(decoding: bytes, as: UTF8.self))
            let reader = try OptionReader(value, of: "the list")
            let list = try AuthorizationList(reader)
            try reader.finish()
            return list
        } catch {
            throw BlockError(error.code, "'\(path)': \(error.description)")
        }
    }

    private static func stamp(_ path: String) throws(BlockError) -> Stamp {
        var information = stat()
        guard stat(path, &information) == 0 else { throw .system("cannot find '\(path)'", errno) }
        #if canImport(Darwin)
        let time = information.st_mtimespec
        #else
        let time = information.st_mtim
        #endif
        return Stamp(
            inode: UInt64(information.st_ino), size: Int(information.st_size),
            seconds: Int(time.tv_sec), nanoseconds: Int(time.tv_nsec))
    }
}
