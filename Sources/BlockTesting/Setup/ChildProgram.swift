import CBlockTesting

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#else
import Darwin
#endif

/// A program that a test starts, and what it prints.
///
/// Its output goes to files that have no name: however much comes, nobody waits for anybody, and what it leaves
/// running behind it holds nobody up. Nothing here depends on how many descriptors the test program has open, as
/// Foundation's `Process` does, which waits for ever for a child when they are more than select(2) takes.
///
/// Not thread-safe: one owner, who ends with ``wait()``.
public final class ChildProgram {
    /// What a program left behind.
    public struct Output: Sendable {
        /// The exit status, or 128 and the number of the signal that ended it.
        public var status: Int32
        public var output: String
        public var errors: String
    }

    /// The program could not be started.
    public struct NotStarted: Error, CustomStringConvertible {
        public var description: String
    }

    /// Where a program's standard input comes from.
    public enum Input {
        case text(String)
        /// From ``ChildProgram/send(_:)``.
        case held
    }

    /// Where a program's standard error goes.
    public enum Errors {
        case apart
        /// Into the output, in the order in which they are written.
        case joined
    }

    public let identifier: pid_t
    private let output: Int32
    private let errors: Int32
    private var input: Int32 = -1
    private var status: Int32?

    /// Starts a program.
    /// - Parameters:
    ///   - arguments: its name, which is looked up in `PATH`, and its arguments.
    ///   - folder: where it runs; nil: where the test does.
    ///   - environment: all of it; nil: the test's.
    ///   - seconds: after which it is ended.
    public init(
        _ arguments: [String], in folder: String? = nil, environment: [String: String]? = nil,
        input: Input = .text(""), errors: Errors = .apart, limit seconds: Int = 300
    ) throws {
        let line = ["/usr/bin/timeout", "\(seconds)"] + arguments
        output = try Self.namelessFile()
        self.errors = errors == .joined ? output : try Self.namelessFile()
        let source: Int32
        switch input {
        case .text(let text):
            source = try Self.namelessFile()
            Self.store(Array(text.utf8), in: source)
            lseek(source, 0, SEEK_SET)
        case .held:
            var ends: [Int32] = [-1, -1]
            guard pipe(&ends) == 0 else { throw Self.failure("a pipe", errno) }
            for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
            source = ends[0]
            self.input = ends[1]
        }
        defer { close(source) }
        var child: pid_t = -1
        let descriptors = [source, output, self.errors]
        let result = Self.withCStrings(line) { arguments in
            Self.withCStrings(environment?.map { "\($0.key)=\($0.value)" } ?? []) { variables in
                testing_spawn(
                    &child, arguments, environment == nil ? nil : variables, folder,
                    descriptors)
            }
        }
        identifier = child
        guard result == 0 else { throw Self.failure(arguments.first ?? "nothing", result) }
    }

    deinit {
        if identifier > 0 { end() }
        closeInput()
        close(output)
        if errors != output { close(errors) }
    }

    /// Runs a program to its end.
    public static func run(
        _ arguments: [String], in folder: String? = nil, environment: [String: String]? = nil,
        input: String = "", errors: Errors = .apart, limit seconds: Int = 300
    ) throws -> Output {
        try ChildProgram(
            arguments, in: folder, environment: environment, input: .text(input), errors: errors,
            limit: seconds
        ).wait()
    }

    public var isRunning: Bool { status == nil && testing_has_ended(identifier) == 0 }

    /// Gives a program whose input is held something to read.
    public func send(_ text: String) {
        Self.store(Array(text.utf8), in: input)
    }

    /// The input that is held ends.
    public func closeInput() {
        if input >= 0 { close(input) }
        input = -1
    }

    /// Waits for the end.
    @discardableResult
    public func wait() -> Output {
        let status = self.status ?? testing_wait(identifier)
        self.status = status
        return Output(
            status: status, output: Self.text(of: output),
            errors: errors == output ? "" : Self.text(of: errors))
    }

    /// Ends it at once, with all that belongs to it, and waits for that.
    public func end() {
        guard status == nil else { return }
        // timeout(1) hands the signal on, and leads the group of what it runs.
        kill(-identifier, SIGKILL)
        kill(identifier, SIGKILL)
        wait()
    }

    // MARK: Descriptors

    private static func namelessFile() throws -> Int32 {
        var name = Array("/tmp/merino-output-XXXXXX".utf8CString)
        let descriptor = mkstemp(&name)
        guard descriptor >= 0 else { throw failure("a temporary file", errno) }
        unlink(name)
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
        // Several writers to one file, none over another.
        _ = fcntl(descriptor, F_SETFL, O_APPEND)
        return descriptor
    }

    private static func store(_ bytes: [UInt8], in descriptor: Int32) {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
            guard count > 0 else { return }
            rest = rest.dropFirst(count)
        }
    }

    private static func text(of descriptor: Int32) -> String {
        var bytes: [UInt8] = []
        var part = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let count = pread(descriptor, &part, part.count, off_t(bytes.count))
            guard count > 0 else { return String(decoding: bytes, as: UTF8.self) }
            bytes += part[..<count]
        }
    }

    private static func failure(_ what: String, _ number: Int32) -> NotStarted {
        NotStarted(description: "\(what): \(String(cString: strerror(number)))")
    }

    /// Calls `body` with the strings as C has them, and null after them.
    private static func withCStrings<T>(
        _ strings: [String], _ body: ([UnsafeMutablePointer<CChar>?]) -> T
    ) -> T {
        let copies = strings.map { strdup($0) }
        defer { for copy in copies { free(copy) } }
        return body(copies + [nil])
    }
}
