import ArgumentParser
import BlockCore
import BlockGraph
import ImageTools

/// `merino check`: what is wrong inside of an image, with the options of `qemu-img check`.
struct CheckCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check", _superCommandName: "merino",
        abstract: "Look for damage in an image, as qemu-img check does.",
        discussion: """
            The exit code is 0 when the image is clean, 1 when the check could not be done, 2 when it \
            is corrupt, 3 when clusters are leaked, and 63 when images of its format have nothing \
            to check.
            """)

    /// What `-r` takes.
    enum Repair: String, ExpressibleByArgument, CaseIterable {
        case leaks, all

        var scope: CheckRepair { self == .leaks ? .leaks : .all }
    }

    /// The exit code for formats that have nothing to check.
    private static let nothingToCheck: Int32 = 63

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @Option(
        name: [.customShort("r", allowingJoined: true), .long],
        help: "Repair: leaks gives lost space back, all mends everything.")
    var repair: Repair?
    @Option(
        name: [.customShort("T", allowingJoined: true), .customLong("source-cache")],
        help: "none, writeback, writethrough, directsync or unsafe.")
    var cache = "writeback"
    @Option(help: "human, or json for programs.") var output = OutputFormat.human
    @Flag(name: [.customShort("q"), .long], help: "Say nothing but errors.") var quiet = false

    func run() throws {
        var found: ImageCheck?
        try Failure.rethrow { () throws(BlockError) in
            var source = try self.image.source(file)
            source.cache = try CacheMode(named: cache)
            let (image, scope) = (source, repair?.scope ?? [])
            found = try ToolSession.run { session throws(BlockError) in
                try await ImageCheck.run(image, repair: scope, in: session) { line in
                    StandardError.print(line)
                }
            }
        }
        guard let found else {
            StandardError.print("\(Merino.program): images of this format have nothing to check")
            throw ExitCode(Self.nothingToCheck)
        }
        if !quiet { output.print(found.text, found.json) }
        if found.report.checkErrors > 0 {
            StandardError.print("\(Merino.program): parts of the image could not be looked at")
        }
        if found.exitCode != 0 { throw ExitCode(found.exitCode) }
    }
}
