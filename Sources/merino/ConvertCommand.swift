import ArgumentParser
import BlockCore
import ImageTools

/// `merino convert`: an image in another format or place, with the options of `qemu-img convert`.
struct ConvertCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert", _superCommandName: "merino",
        abstract: "Copy an image to another format, as qemu-img convert does.",
        discussion: """
            The last name is the target; several sources are joined. The target gets its name when all \
            of it is there: until then it is called NAME.merino-partial.
            """)

    @Argument(help: "The source, more sources, and the target.") var files: [String] = []
    @OptionGroup var image: ImageArguments
    @OptionGroup var shown: ProgressArguments
    @Option(
        name: [.customShort("O", allowingJoined: true), .customLong("target-format")],
        help: "The target's format.")
    var targetFormat: String?
    @Flag(name: .customLong("target-image-opts"), help: "The target is given as options; needs -n.")
    var targetImageOptions = false
    @Option(
        name: [.customShort("o", allowingJoined: true), .customLong("target-format-options")],
        help: "key=value,… of the target's format; 'help' lists them.")
    var options: [String] = []
    @Option(
        name: [
            .customShort("B", allowingJoined: true), .customShort("b", allowingJoined: true),
            .customLong("backing"),
        ],
        help: "The target's backing image: only what the source has above its own is copied.")
    var backing: String?
    @Option(
        name: [.customShort("F", allowingJoined: true), .customLong("backing-format")],
        help: "The backing image's format.")
    var backingFormat: String?
    @Flag(
        name: [.customShort("n"), .customLong("no-create")], help: "The target is there already.")
    var noCreate = false
    @Flag(name: .customLong("target-is-zero"), help: "The target reads as zeroes; needs -n.")
    var targetIsZero = false
    @Flag(name: [.customShort("c"), .customLong("compress")], help: "Store the data compressed.")
    var compress = false
    @Flag(
        name: [.customShort("C"), .customLong("copy-range-offloading")],
        help: "Have the storage copy, where it can.")
    var offload = false
    @Option(
        name: [.customShort("S", allowingJoined: true), .customLong("sparse-size")],
        help: "So many zeroes in a row are left out; 0 stores everything (4k).")
    var sparseSize: String?
    @Option(
        name: [.customShort("m", allowingJoined: true), .customLong("parallel")],
        help: "Requests at the same time: 1 to 16.")
    var parallel = 8
    @Flag(name: [.customShort("W"), .customLong("oob-writes")], help: "Write in any order.")
    var outOfOrder = false
    @Option(
        name: [.customShort("r", allowingJoined: true), .customLong("rate-limit")],
        help: "Bytes a second at most.")
    var rate: String?
    @Option(
        name: [.customShort("t", allowingJoined: true), .customLong("target-cache")],
        help: "The target's cache mode.")
    var targetCache = "unsafe"
    @Option(
        name: [.customShort("T", allowingJoined: true), .customLong("source-cache")],
        help: "The sources' cache mode.")
    var sourceCache = "writeback"
    @Option(
        name: [.customShort("l", allowingJoined: true), .customLong("snapshot")],
        help: "Copy this internal snapshot.")
    var snapshot: String?
    @Flag(help: "What cannot be read becomes zeroes.") var salvage = false
    @Flag(help: "Copy the persistent dirty bitmaps too.") var bitmaps = false
    @Flag(name: .customLong("skip-broken-bitmaps"), help: "Leave inconsistent bitmaps out.")
    var skipBrokenBitmaps = false

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            var convert = ImageConvert()
            if let targetFormat { convert.targetFormat = targetFormat }
            convert.options = options
            if convert.wantsHelp {
                convert.target = files.last ?? ""
                StandardOutput.print(try convert.help())
                return
            }
            try take(&convert)
            let (work, shown) = (convert, shown)
            try ToolSession.run { session throws(BlockError) in
                let unfinished = UnfinishedFile()
                let progress = try shown.begin(in: session) { unfinished.discard() }
                defer { progress.end() }
                try await work.run(in: session, progress: progress, unfinished: unfinished)
            }
        }
    }

    private func take(_ convert: inout ImageConvert) throws(BlockError) {
        guard let target = files.last, files.count > 1 else {
            throw BlockError(
                .invalidArgument, "convert needs a source and a target",
                remedy: "as in 'convert -O qcow2 disk.raw disk.qcow2'")
        }
        convert.target = target
        convert.objects = image.object
        for name in files.dropLast() {
            var source = try image.source(name)
            source.cache = try CacheMode(named: sourceCache)
            convert.sources.append(source)
        }
        convert.targetIsOptions = targetImageOptions
        convert.targetCache = try CacheMode(named: targetCache)
        convert.backing = backing
        convert.backingFormat = backingFormat
        convert.creates = !noCreate
        convert.targetIsZero = targetIsZero
        convert.compresses = compress
        if let sparseSize {
            convert.sparseBytes = try ArgumentText.size(sparseSize, "the sparse size")
        }
        convert.workerCount = parallel
        convert.outOfOrder = outOfOrder
        if let rate { convert.rate = try ArgumentText.size(rate, "the rate limit") }
        convert.offloads = offload
        convert.salvages = salvage
        convert.snapshot = snapshot
        convert.copiesBitmaps = bitmaps
        convert.skipsBrokenBitmaps = skipBrokenBitmaps
        if !shown.quiet {
            convert.warn = { text in StandardError.print("\(Merino.program): warning: \(text)") }
        }
    }
}
