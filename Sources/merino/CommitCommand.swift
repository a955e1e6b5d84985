import ArgumentParser
import BlockCore
import ImageTools

/// `merino commit`: an image's data into an image below it, with the options of `qemu-img commit`.
struct CommitCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "commit", _superCommandName: "merino",
        abstract: "Write what an image has into an image below it, as qemu-img commit does.")

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @OptionGroup var shown: ProgressArguments
    @Option(
        name: [.customShort("t", allowingJoined: true), .long], help: "The images' cache mode.")
    var cache = "writeback"
    @Option(
        name: [.customShort("b", allowingJoined: true), .long],
        help: "The image below to write to; implies -d.")
    var base: String?
    @Flag(name: [.customShort("d"), .long], help: "Do not empty the image afterwards.")
    var drop = false
    @Option(
        name: [.customShort("r", allowingJoined: true), .customLong("rate-limit")],
        help: "Bytes a second at most.")
    var rate: String?

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            var source = try image.source(file)
            source.cache = try CacheMode(named: cache)
            source.isWritable = true
            var commit = ImageCommit(source)
            commit.base = base
            commit.dropsImage = drop
            if let rate { commit.rate = try ArgumentText.size(rate, "the rate limit") }
            let (work, shown) = (commit, shown)
            try ToolSession.run { session throws(BlockError) in
                let progress = try shown.begin(in: session)
                defer { progress.end() }
                try await work.run(in: session, progress: progress)
            }
            if !shown.quiet { StandardOutput.print("Image committed.\n") }
        }
    }
}
