import ArgumentParser
import BlockCore
import BlockIO
import ImageTools

/// `merino io`: reads and writes an image command by command, with the options of `qemu-io`.
struct IOCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "io", _superCommandName: "merino",
        abstract: "Read and write an image by commands, as qemu-io does.",
        discussion: """
            Commands come from -c, one after the other, or else from standard input, one a line. \
            'merino io -c help' lists them. The exit code is 1 when one of them failed.
            """)

    @Argument(help: "The image; 'open' can name it too.") var file: String?
    @Option(
        name: [.customShort("c", allowingJoined: true), .customLong("cmd")],
        help: "A command; several are run in order.")
    var commands: [String] = []
    @OptionGroup var image: ImageArguments
    @Flag(name: [.customShort("r"), .customLong("read-only")], help: "Only for reading.")
    var readOnly = false
    @Flag(name: [.customShort("n"), .long], help: "The same as -t none.") var nocache = false
    @Option(
        name: [.customShort("t", allowingJoined: true), .long],
        help: "none, writeback, writethrough, directsync or unsafe.")
    var cache = "writeback"
    @Option(
        name: [.customShort("d", allowingJoined: true), .long], help: "unmap or ignore.")
    var discard = "unmap"
    @Flag(name: [.customShort("k"), .customLong("native-aio")], help: "The same as -i native.")
    var nativeAIO = false
    @Option(
        name: [.customShort("i", allowingJoined: true), .long],
        help: "threads, native or io_uring.")
    var aio: String?
    @Flag(
        name: [.customShort("s"), .long],
        help: "Write to a temporary file, which is gone at the end.")
    var snapshot = false
    @Flag(
        name: [.customShort("C"), .customLong("copy-on-read")],
        help: "Keep what is read from a backing image in the image.")
    var copyOnRead = false
    @Flag(name: [.customShort("m"), .long], help: "Taken for compatibility; does nothing.")
    var misalign = false
    @OptionGroup var tracing: TraceArguments

    func run() throws {
        var hasFailed = false
        try Failure.rethrow { () throws(BlockError) in
            if try tracing.apply() { return }
            let source = try source
            let (commands, isNamed) = (commands, file != nil)
            hasFailed = try ToolSession.run { session throws(BlockError) in
                var complaint: ((String) -> Void)?
                if Merino.program == "qemu-io" { complaint = { StandardError.print($0) } }
                let exerciser = Exerciser(
                    in: session, standard: source, output: { StandardOutput.print($0) },
                    complaint: complaint,
                    notice: { StandardError.print("\(Merino.program): \($0)") })
                if isNamed { try await exerciser.open(source) }
                let failed = await Self.feed(exerciser, commands, session)
                try await exerciser.close()
                return failed
            }
        }
        if hasFailed { throw ExitCode(1) }
    }

    private var source: ImageSource {
        get throws(BlockError) {
            var source = try image.source(file ?? "")
            source.isWritable = !readOnly
            guard !copyOnRead || !readOnly else {
                throw BlockError(.invalidArgument, "-C and -r exclude each other")
            }
            source.copiesOnRead = copyOnRead
            source.isTemporary = snapshot && !readOnly
            source.cache = nocache ? .none : try CacheMode(named: cache)
            source.discards = try ImageSource.discards(mode: discard)
            source.asynchronousIO = nativeAIO ? "native" : aio
            source.warnOfProbing()
            return source
        }
    }

    /// Runs the commands, or those of standard input.
    ///
    /// - Returns: whether one failed.
    private static func feed(
        _ exerciser: Exerciser, _ commands: [String], _ session: ToolSession
    ) async -> Bool {
        var hasFailed = false
        for command in commands where !exerciser.isFinished {
            if await !exerciser.run(command) { hasFailed = true }
        }
        guard commands.isEmpty else { return hasFailed }
        let prompt = "\(Merino.program == "merino" ? "merino" : "qemu-io")> "
        let input = CommandInput(prompt: prompt)
        while !exerciser.isFinished {
            // Requests on their way go on while a person types.
            guard let line = await session.thread.offload({ input.line() }) else { break }
            if await !exerciser.run(line) { hasFailed = true }
        }
        return hasFailed
    }
}

/// Lines of commands: typed at a terminal, or from a file or pipe. One line is waited for at a time.
private final class CommandInput: @unchecked Sendable {
    private let prompt: String
    private var terminal: Terminal?

    init(prompt: String) {
        self.prompt = prompt
        terminal = Terminal(prompt: prompt, names: Exerciser.commandNames)
    }

    func line() -> String? {
        if terminal != nil { return terminal?.line() }
        StandardOutput.print(prompt)
        return readLine()
    }
}
