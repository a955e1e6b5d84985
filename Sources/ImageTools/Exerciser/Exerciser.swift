import BlockCore
import BlockGraph
import BlockIO

/// Reads and writes an image as a script or a person says, command by command: `merino io`.
///
/// Confined to the session's thread. Results go to `output` in lines that scripts know, notices on
/// what went wrong to `notice`.
public final class Exerciser: @unchecked Sendable {
    struct Command {
        let name: String
        var alias: String?
        /// How many words may follow the name, options included.
        let arguments: ClosedRange<Int>
        var needsImage = true
        /// What follows the name, for help.
        let synopsis: String
        let summary: String
        var details: String?
        let run: @Sendable (Exerciser, [String]) async throws(BlockError) -> Void
    }

    let session: ToolSession
    let output: (String) -> Void
    let notice: (String) -> Void
    /// Takes errors about lines that no command begins, when called by the original's name.
    private let complaint: ((String) -> Void)?
    private var isCompatible: Bool { complaint != nil }
    /// How the command line opens images; `open` begins with it.
    let standard: ImageSource
    /// The open image and how it was opened.
    var edge: Edge?
    var source: ImageSource
    /// `quit` was run.
    public private(set) var isFinished = false
    /// Set by a command that failed in a way that its result line tells already.
    var hasFailed = false
    private var asynchronousCount = 0
    private let asynchronousEnd = WaitQueue()

    /// - Parameters:
    ///   - standard: how images are opened where a command does not say otherwise.
    ///   - complaint: takes lines that have no program's name in front; where there is one, what is wrong
    ///     with a command's arguments is told among the results, as the original does.
    public init(
        in session: ToolSession, standard: ImageSource, output: @escaping (String) -> Void,
        complaint: ((String) -> Void)? = nil, notice: @escaping (String) -> Void
    ) {
        self.complaint = complaint
        self.session = session
        self.standard = standard
        self.output = output
        self.notice = notice
        source = standard
    }

    /// Commands of newer exercisers, for zoned devices: told apart from what nobody knows.
    private static let zoneCommands: Set<String> = [
        "zone_report", "zone_open", "zone_close", "zone_finish", "zone_reset", "zone_append", "zrp",
        "zo", "zc", "zf", "zrs", "zap",
    ]

    static let commands: [Command] =
        (imageCommands + dataCommands + debugCommands + [help, quit, reopenCommand, sleep])
        .sorted { $0.name < $1.name }

    /// For completion.
    public static let commandNames = commands.map(\.name)

    // MARK: Running

    /// Runs one line.
    ///
    /// - Returns: whether it succeeded; what went wrong was said already.
    public func run(_ line: String) async -> Bool {
        let words = line.split(whereSeparator: \.isWhitespace).map(String.init)
        guard let name = words.first else { return true }
        hasFailed = false
        do throws(BlockError) {
            try await run(name, Array(words.dropFirst()))
        } catch {
            tell(error)
            return false
        }
        return !hasFailed
    }

    /// The remedy of errors about a line as a whole; ``tell(_:)`` knows them by it.
    private static let listRemedy = "'help' lists the commands"

    /// Scripts look for what is wrong with a line where the original says it: among the results, or, of the
    /// line as a whole, among the errors, without a program's name.
    private func tell(_ error: BlockError) {
        switch error.remedy {
        case ExerciserArguments.remedy where isCompatible: output("\(error.message)\n")
        case Self.listRemedy where isCompatible: complaint?(error.message)
        default: notice(error.description)
        }
    }

    private func run(_ name: String, _ words: [String]) async throws(BlockError) {
        guard let command = Self.command(named: name) else {
            if Self.zoneCommands.contains(name) {
                throw BlockError(
                    .unsupported,
                    "command '\(name)' is not supported: there is no access to zoned devices")
            }
            throw BlockError(.notFound, "command \"\(name)\" not found", remedy: Self.listRemedy)
        }
        guard command.arguments.contains(words.count) else {
            throw BlockError(
                .notFound,
                "bad argument count \(words.count) to \(name), expected "
                    + Self.expected(command.arguments), remedy: Self.listRemedy)
        }
        if command.needsImage, edge == nil {
            throw BlockError(.notFound, "no file open", remedy: "try 'help open'")
        }
        try await command.run(self, words)
    }

    static func command(named name: String) -> Command? {
        commands.first { $0.name == name || $0.alias == name }
    }

    private static func expected(_ count: ClosedRange<Int>) -> String {
        if count.lowerBound == count.upperBound { return "\(count.lowerBound) arguments" }
        if count.upperBound == .max { return "at least \(count.lowerBound) arguments" }
        return "between \(count.lowerBound) and \(count.upperBound) arguments"
    }

    /// The open image; commands that need one are not run without.
    func image() throws(BlockError) -> Edge {
        guard let edge else { throw BlockError(.notFound, "no file open") }
        return edge
    }

    /// Opens `source` as the image that commands work on.
    public func open(_ source: ImageSource) async throws(BlockError) {
        var access = Access.read
        if source.isWritable { access.uses.formUnion([.write, .resize]) }
        let edge = try await session.use(source, as: "the exerciser", access)
        edge.isWriteThrough = source.cache.isWriteThrough
        self.edge = edge
        self.source = source
    }

    /// Waits for requests that are on their way, and closes the image.
    public func close() async throws(BlockError) {
        await settle()
        guard let edge else { return }
        self.edge = nil
        try await session.graph.detach(edge)
    }

    // MARK: Asynchronous requests

    /// Runs `work` beside the commands that follow.
    func start(_ work: @escaping @Sendable () async -> Void) {
        asynchronousCount += 1
        session.thread.spawn { [self] in
            await work()
            asynchronousCount -= 1
            if asynchronousCount == 0 { asynchronousEnd.wakeAll() }
        }
    }

    /// Whether one is on its way.
    var isBusy: Bool { asynchronousCount > 0 }

    /// Waits for all of them.
    func settle() async {
        while asynchronousCount > 0 { await asynchronousEnd.wait() }
    }

    /// Says that a request failed: its result line, and why.
    ///
    /// - Parameter isBeside: the request's command is over, and did not fail.
    func report(_ name: String, failed error: BlockError, isBeside: Bool = false) {
        // Of what is refused without being tried there is no result.
        if error.code != .readOnly {
            let reason: BlockError.Code = error.code == .outOfRange ? .inputOutput : error.code
            let number = error.code == .outOfRange ? reason.systemError : error.systemError
            output("\(name) failed: \(BlockError.describe(number))\n")
        }
        notice(error.description)
        if !isBeside { hasFailed = true }
    }
}

extension Exerciser {
    private static let help = Command(
        name: "help", alias: "?", arguments: 0...1, needsImage: false, synopsis: "[command]",
        summary: "help for one or all commands"
    ) { exerciser, words throws(BlockError) in
        guard let name = words.first else {
            for command in commands { exerciser.output(line(of: command)) }
            exerciser.output("\nUse 'help commandname' for extended help.\n")
            return
        }
        guard let command = command(named: name) else {
            throw ExerciserArguments.misuse("command \(name) not found")
        }
        exerciser.output(line(of: command))
        if let details = command.details { exerciser.output("\n\(details)\n\n") }
    }

    private static func line(of command: Command) -> String {
        let synopsis = command.synopsis.isEmpty ? "" : " \(command.synopsis)"
        return "\(command.name)\(synopsis) -- \(command.summary)\n"
    }

    private static let quit = Command(
        name: "quit", alias: "q", arguments: 0...Int.max, needsImage: false, synopsis: "",
        summary: "exit the program"
    ) { exerciser, _ throws(BlockError) in
        exerciser.isFinished = true
    }

    private static let sleep = Command(
        name: "sleep", arguments: 1...1, needsImage: false, synopsis: "milliseconds",
        summary: "waits; requests on their way go on"
    ) { exerciser, words throws(BlockError) in
        guard let milliseconds = UInt64(words[0]), milliseconds <= 1 << 40 else {
            throw ExerciserArguments.misuse("\(words[0]) is not a valid number")
        }
        await exerciser.session.thread.sleep(nanoseconds: milliseconds * 1_000_000)
    }
}
