import ArgumentParser
import BlockCore
import ImageTools

/// `merino compact`: an image without the space that it does not need.
struct CompactCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "compact", _superCommandName: "merino",
        abstract: "Rewrite an image without unused space, prove the copy, and swap it in.",
        discussion: """
            The image is held while it is copied to NAME.merino-partial beside it, with its snapshots, \
            bitmaps and keys; both are compared, and only then the copy takes the name, in one step. \
            There must be room for both.
            """)

    @Argument(help: "The image: a file, or with --image-opts options that name one.")
    var file: String
    @OptionGroup var form: ImageFormArguments
    @Flag(name: [.customShort("c"), .customLong("compress")], help: "Store the data compressed.")
    var compress = false
    @Option(help: "An object that the image needs, as in secret,id=….") var object: [String] = []
    @OptionGroup var shown: ProgressArguments

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            var source = form.source(file)
            source.objects = object
            var compact = ImageCompact(source)
            compact.compresses = compress
            let (work, shown) = (compact, shown)
            let result = try ToolSession.run { session throws(BlockError) in
                let unfinished = UnfinishedFile()
                let progress = try shown.begin(in: session) { unfinished.discard() }
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
