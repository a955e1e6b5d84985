import ArgumentParser
import BlockCore
import ImageTools

/// `merino measure`: the storage that a new image will take, with the options of `qemu-img measure`.
struct MeasureCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "measure", _superCommandName: "merino",
        abstract: "Say how much storage a new image will take, as qemu-img measure does.")

    @Argument(help: "The image to be copied.") var file: String?
    @OptionGroup var image: ImageArguments
    @Option(
        name: [.customShort("O", allowingJoined: true), .customLong("target-format")],
        help: "The new image's format.")
    var targetFormat = "raw"
    @Option(
        name: [.customShort("o", allowingJoined: true), .customLong("options")],
        help: "key=value,… of the new image's format; 'help' lists them.")
    var options: [String] = []
    @Option(
        name: [.customShort("s", allowingJoined: true), .customLong("size")],
        help: "The size of a new, empty disk.")
    var size: String?
    @Option(
        name: [.customShort("l", allowingJoined: true), .customLong("snapshot")],
        help: "Copy this internal snapshot.")
    var snapshot: String?
    @Option(help: "human, or json for programs.") var output = OutputFormat.human

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            var measure = ImageMeasure()
            measure.format = targetFormat
            measure.options = options
            if measure.wantsHelp {
                StandardOutput.print(try measure.help())
                return
            }
            if let size { measure.size = try ArgumentText.size(size, "the size") }
            if let file { measure.source = try image.source(file) }
            measure.snapshot = snapshot
            let work = measure
            let result = try ToolSession.run { session throws(BlockError) in
                try await work.run(in: session)
            }
            output.print(result.text, result.json)
        }
    }
}
