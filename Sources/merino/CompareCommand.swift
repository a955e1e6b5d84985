import ArgumentParser
import BlockCore
import ImageTools

/// `merino compare`: whether two images have the same contents, with the options of `qemu-img compare`.
struct CompareCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "compare", _superCommandName: "merino",
        abstract: "Say whether two images have the same contents, as qemu-img compare does.",
        discussion: """
            The exit code is 0 for identical images, 1 for different ones, 2 when an image cannot be \
            opened, 3 when its allocation and 4 when its data cannot be read.
            """)

    @Argument(help: "The two images.") var files: [String] = []
    @OptionGroup var image: ImageArguments
    @OptionGroup var shown: ProgressArguments
    @Option(
        name: [.customShort("F", allowingJoined: true), .customLong("b-format")],
        help: "The second image's format; found out when not given.")
    var secondFormat: String?
    @Flag(name: [.customShort("s"), .long], help: "Sizes and allocation count too.")
    var strict = false
    @Option(
        name: [.customShort("T", allowingJoined: true), .long], help: "The images' cache mode.")
    var cache = "writeback"

    func run() throws {
        CommandSignals.prepare()
        var code: Int32 = 0
        try Failure.rethrow { () throws(BlockError) in
            guard let cache = cacheMode else {
                code = ImageCompare.Failure.openingCode
                return
            }
            let compare = try compare(cache)
            let shown = shown
            code = try ToolSession.run { session throws(BlockError) in
                let progress = try shown.begin(in: session)
                defer { progress.end() }
                do throws(ImageCompare.Failure) {
                    let result = try await compare.run(in: session, progress: progress)
                    if !shown.quiet { StandardOutput.print(result.text) }
                    return result.exitCode
                } catch {
                    StandardError.print("\(Merino.program): \(error.error.plainDescription)")
                    return error.code
                }
            }
        }
        if code != 0 { throw ExitCode(code) }
    }

    /// `nil` for none that there is, which counts as an image that cannot be opened.
    private var cacheMode: CacheMode? {
        do throws(BlockError) {
            return try CacheMode(named: cache)
        } catch {
            StandardError.print("\(Merino.program): \(error.plainDescription)")
            return nil
        }
    }

    private func compare(_ mode: CacheMode) throws(BlockError) -> ImageCompare {
        guard files.count == 2 else {
            throw BlockError(.invalidArgument, "compare needs two images")
        }
        var first = try image.source(files[0])
        var second = try image.source(files[1])
        second.format = secondFormat
        first.cache = mode
        second.cache = mode
        var compare = ImageCompare(first, second)
        compare.isStrict = strict
        return compare
    }
}
