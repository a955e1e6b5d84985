import ArgumentParser
import BlockCore
import ImageTools

/// `merino amend`: changes an image that is there already, with the options of `qemu-img amend`.
struct AmendCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "amend", _superCommandName: "merino",
        abstract: "Change an image's version, backing file, size or keys, as qemu-img amend does.")

    @Argument(help: "The image.") var file: String?
    @OptionGroup var image: ImageArguments
    @OptionGroup var shown: ProgressArguments
    @Option(
        name: [.customShort("o", allowingJoined: true), .long],
        help: "key=value,… of the format; 'help' lists them.")
    var options: [String] = []
    @Option(
        name: [.customShort("t", allowingJoined: true), .long],
        help: "none, writeback, writethrough, directsync or unsafe.")
    var cache = "writeback"
    @Flag(help: "Do also what may make data unreadable for good.") var force = false

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            guard !options.isEmpty else {
                throw BlockError(.invalidArgument, "there is nothing to change", remedy: "give -o")
            }
            var source = try image.source(file ?? "")
            source.cache = try CacheMode(named: cache)
            source.withoutBacking = false
            var amend = ImageAmend(source)
            amend.options = options
            amend.isForced = force
            if amend.wantsHelp {
                StandardOutput.print(try ImageAmend.help(format: image.form.format ?? "qcow2"))
                return
            }
            guard file != nil else {
                throw BlockError(.invalidArgument, "the image's <file> is missing")
            }
            let (work, shown) = (amend, shown)
            try ToolSession.run { session throws(BlockError) in
                let progress = try shown.begin(in: session)
                defer { progress.end() }
                try await work.run(in: session, progress: progress)
            }
        }
    }
}
