import ArgumentParser
import BlockCore
import BlockGraph
import ImageTools

/// `merino resize`: gives an image another size, with the options of `qemu-img resize`.
struct ResizeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "resize", _superCommandName: "merino",
        abstract: "Give an image another size, as qemu-img resize does.",
        discussion: """
            The size is bytes, or takes a unit: k, M, G, T, P, E; with + or - in front the image grows or \
            shrinks by that.
            """)

    @Argument(help: "The image.") var file: String
    @Argument(help: "Its new size, as in 10G, +1G or -512M.") var size: String
    @OptionGroup var image: ImageArguments
    @Option(help: "How new space is reserved: off, metadata, falloc or full.")
    var preallocation = "off"
    @Flag(help: "What lies past the new end may be lost.") var shrink = false
    @Flag(name: [.customShort("q"), .long], help: "Say nothing but errors.") var quiet = false

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            var source = try image.source(file)
            source.isWritable = true
            source.discards = true
            source.warnOfProbing()
            var resize = ImageResize(source, try ImageResize.change(size))
            guard let mode = Preallocation(rawValue: preallocation) else {
                throw BlockError(
                    .invalidArgument, "there is no preallocation mode '\(preallocation)'",
                    remedy: "use off, metadata, falloc or full")
            }
            resize.preallocation = mode
            resize.mayShrink = shrink
            let work = resize
            try ToolSession.run { session throws(BlockError) in try await work.run(in: session) }
            if !quiet { StandardOutput.print("Image resized.\n") }
        }
    }
}
