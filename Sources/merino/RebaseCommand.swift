import ArgumentParser
import BlockCore
import ImageTools

/// `merino rebase`: another backing image for an image, with the options of `qemu-img rebase`.
struct RebaseCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "rebase", _superCommandName: "merino",
        abstract: "Give an image another backing image, as qemu-img rebase does.",
        discussion: """
            The image's contents stay as they are: what differs between the old and the new backing image \
            is copied into it. With -u only the name changes.
            """)

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @OptionGroup var shown: ProgressArguments
    @Option(
        name: [.customShort("b", allowingJoined: true), .long],
        help: "The new backing image; \"\" for none.")
    var backing: String?
    @Option(
        name: [
            .customShort("F", allowingJoined: true), .customShort("B", allowingJoined: true),
            .customLong("backing-format"),
        ],
        help: "Its format.")
    var backingFormat: String?
    @Flag(
        name: [.customShort("u"), .customLong("backing-unsafe")],
        help: "Change the name alone, whatever the contents.")
    var isUnsafe = false
    @Flag(
        name: [.customShort("c"), .customLong("compress")],
        help: "Store what is copied compressed.")
    var compress = false
    @Option(
        name: [.customShort("t", allowingJoined: true), .long], help: "The image's cache mode.")
    var cache = "writeback"
    @Option(
        name: [.customShort("T", allowingJoined: true), .customLong("backing-cache")],
        help: "The backing images' cache mode.")
    var backingCache = "writeback"

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            var source = try image.source(file)
            source.cache = try CacheMode(named: cache)
            source.sharesAll = false
            source.warnOfProbing()
            var rebase = ImageRebase(source)
            rebase.backing = backing
            rebase.backingFormat = backingFormat
            rebase.isUnsafe = isUnsafe
            rebase.compresses = compress
            rebase.backingCache = try CacheMode(named: backingCache)
            let (work, shown) = (rebase, shown)
            try ToolSession.run { session throws(BlockError) in
                let progress = try shown.begin(in: session)
                defer { progress.end() }
                try await work.run(in: session, progress: progress)
            }
        }
    }
}
