import ArgumentParser
import BlockCore
import ImageTools

/// `merino compact`: an image without the space that it does not need.
struct CompactCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "compact",
        abstract: "Rewrite an image without unused space, prove the copy, and swap it in.",
        discussion: """
            The image is held while it is copied to NAME.merino-partial beside it; both are compared, and \
            only then the copy takes the name, in one step. There must be room for both.
            """)

    @Argument(help: "The image: a file.") var file: String
    @Option(
        name: [.customShort("f", allowingJoined: true), .long],
        help: "The image's format; found out when not given.")
    var format: String?
    @Flag(name: [.customShort("c"), .customLong("compress")], help: "Store the data compressed.")
    var compress = false
    @OptionGroup var shown: ProgressArguments

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            var compact = ImageCompact(ImageSource(file, format: format))
            compact.compresses = compress
            let (work, shown) = (compact, shown)
            let result = try ToolSession.run { session throws(BlockError) in
                let progress = try shown.make()
                let unfinished = UnfinishedFile()
                try CommandSignals.watch(in: session, progress) { unfinished.discard() }
                defer { progress.end() }
                return try await work.run(
                    in: session, progress: progress, unfinished: unfinished)
            }
            guard !shown.quiet else { return }
            let sizes = [result.before, result.after].map { SizeText.format($0) }
            StandardOutput.print(
                result.isUnchanged
                    ? "\(file): \(sizes[0]); a new image would take \(sizes[1]), so it stays\n"
                    : "\(file): \(sizes[0]) before, \(sizes[1]) now\n")
        }
    }
}
