import ArgumentParser
import BlockCore
import ImageTools

/// The command: one subcommand per job.
@main struct Merino: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "merino",
        abstract: "A block-storage engine: disk images, live snapshots, NBD.",
        version: line.version,
        subcommands: [
            DaemonCommand.self,
            ServeCommand.self,
            FleeceCommand.self,
            CreateCommand.self,
            BitmapCommand.self,
            InfoCommand.self,
            MapCommand.self,
            CheckCommand.self,
            AmendCommand.self,
            InspectCommand.self,
            ConvertCommand.self,
            CompareCommand.self,
            MeasureCommand.self,
            ResizeCommand.self,
            CommitCommand.self,
            RebaseCommand.self,
            DDCommand.self,
            BenchCommand.self,
            IOCommand.self,
            SnapshotCommand.self,
            ExportCommand.self,
            GraphCommand.self,
            CompactCommand.self,
        ])

    static let line = CommandLineName(CommandLine.arguments)
    /// The name that messages begin with: the tool's that the command line is compatible with.
    static var program: String { line.program }

    /// Scripts look in the image tool's help for the formats that there are, on one line.
    private static var formats: String {
        guard program == "qemu-img", ["-h", "--help", "help"].contains(line.arguments.first) else {
            return ""
        }
        return "\nSupported formats: "
            + ToolSession.registry.drivers.map(\.name).sorted().joined(separator: " ") + "\n"
    }

    private static let passthroughCommands: [any PassthroughCommand.Type] = [
        DaemonCommand.self, ServeCommand.self,
    ]

    /// The command of a line that begins with its name, or asks for its help. One that reads its words by itself
    /// gets them as they are. Another one parsed alone, as one that knows what it belongs to (`_superCommandName`), is
    /// ready in half the time that the tree of all commands takes. nil: the tree has to look at the line, for it
    /// is wrong or asks for help.
    private static func parsedAlone(_ arguments: [String]) -> (any ParsableCommand)? {
        let asksForHelp = arguments.count == 2 && arguments[0] == "help"
        let asked = asksForHelp ? arguments[1] : arguments.first
        if let type = passthroughCommands.first(where: { $0._commandName == asked }) {
            return type.init(asksForHelp ? ["--help"] : Array(arguments.dropFirst()))
        }
        guard let name = arguments.first,
            let type = configuration.subcommands.first(where: { $0._commandName == name }),
            let command = try? type.parseAsRoot(Array(arguments.dropFirst()))
        else { return nil }
        return Swift.type(of: command) == type ? command : nil
    }

    static func main() {
        do {
            if let failure = line.failure { throw failure }
            if try TraceArguments.apply(line.traces) { end(0) }
            guard program != "qemu-img" || !line.arguments.isEmpty else {
                throw Failure("a command is missing; try 'qemu-img --help'")
            }
            var command = try parsedAlone(line.arguments) ?? parseAsRoot(line.arguments)
            try command.run()
        } catch {
            let code = exitCode(for: error)
            let text = fullMessage(for: error)
            if code == .success {
                StandardOutput.print(text + "\n" + formats)
                end(0)
            }
            if let failure = error as? BlockError {
                StandardError.print("\(program): \(failure.plainDescription)")
            } else if let failure = error as? Failure {
                StandardError.print("\(program): \(failure.description)")
            } else if !text.isEmpty {
                let words = text.hasPrefix("Error: ") ? String(text.dropFirst(7)) : text
                StandardError.print("\(program): \(words)")
            }
            // What scripts know from the tools that the names stand for: 1, for misuse too.
            end(error is ExitCode ? code.rawValue : 1)
        }
    }
}

/// A command that reads its words by itself: the tree of commands, the completions and the manual know it, and no
/// description of its options has to be built before it can start.
protocol PassthroughCommand: ParsableCommand {
    init(_ arguments: [String])
}
