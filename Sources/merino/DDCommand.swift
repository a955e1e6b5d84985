import ArgumentParser
import BlockCore
import ImageTools

/// `merino dd`: a part of an image in a new one, with the options of `qemu-img dd`.
struct DDCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "dd", _superCommandName: "merino",
        abstract: "Copy a part of an image, as qemu-img dd does.",
        discussion: """
            Operands: if=IMAGE of=IMAGE bs=BYTES count=BLOCKS skip=BLOCKS isize=BYTES osize=BYTES. As in \
            qemu-img, count includes the blocks that are skipped.
            """)

    @Argument(help: "if=… of=… bs=… count=… skip=… isize=… osize=…") var operands: [String] = []
    @OptionGroup var image: ImageArguments
    @Option(
        name: [.customShort("O", allowingJoined: true), .customLong("output-format")],
        help: "The new image's format.")
    var outputFormat = "raw"

    func run() throws {
        CommandSignals.prepare()
        try Failure.rethrow { () throws(BlockError) in
            var work = ImageDD()
            work.outputFormat = outputFormat
            for operand in operands {
                try work.take(operand) { name throws(BlockError) in try image.source(name) }
            }
            let dd = work
            try ToolSession.run { session throws(BlockError) in
                let unfinished = UnfinishedFile()
                try CommandSignals.watch(in: session, Progress()) { unfinished.discard() }
                try await dd.run(in: session, unfinished: unfinished) { text in
                    StandardError.print("\(Merino.program): \(text)")
                }
            }
        }
    }
}
