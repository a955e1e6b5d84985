import ArgumentParser
import BlockCore
import ImageTools

/// `merino create`: a new image, with the options of `qemu-img create`.
struct CreateCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create", _superCommandName: "merino",
        abstract: "Make a new image, as qemu-img create does.",
        discussion: """
            Sizes are bytes, or take a unit: k, M, G, T, P, E (powers of 1024). With a backing \
            image the size may be left out: the new image is as large as the backing one.
            """)

    @Argument(help: "The new image's path.") var file: String?
    @Argument(help: "Its size, as in 10G.") var size: String?
    @Option(name: [.customShort("f", allowingJoined: true), .long], help: "Its format.")
    var format = "raw"
    @Option(
        name: [.customShort("o", allowingJoined: true), .long],
        help: "key=value,… of the format; 'help' lists them.")
    var options: [String] = []
    @Option(
        name: [.customShort("b", allowingJoined: true), .long],
        help: "The backing image: what the new one does not have is read there.")
    var backing: String?
    @Option(
        name: [
            .customShort("F", allowingJoined: true), .customShort("B", allowingJoined: true),
            .customLong("backing-format"),
        ],
        help: "The backing image's format.")
    var backingFormat: String?
    @Flag(
        name: [.customShort("u"), .customLong("backing-unsafe")],
        help: "Do not look at the backing image.")
    var trustsBacking = false
    @Flag(name: [.customShort("q"), .long], help: "Say nothing.") var quiet = false
    @Option(help: "An object that the options name, as in secret,id=….") var object: [String] = []

    func run() throws {
        var create = ImageCreate(file ?? "")
        create.format = format
        create.options = options
        create.backing = backing
        create.backingFormat = backingFormat
        create.trustsBacking = trustsBacking
        create.objects = object
        let isQuiet = quiet
        try Failure.rethrow { () throws(BlockError) in
            if create.wantsHelp {
                StandardOutput.print(try create.help())
                return
            }
            guard file != nil else {
                throw BlockError(.invalidArgument, "the new image's <file> is missing")
            }
            if let size { create.size = try ArgumentText.size(size, "the image's size") }
            let create = create
            try ToolSession.run { session throws(BlockError) in
                try await create.run(in: session) { line in
                    if !isQuiet { StandardOutput.print(line + "\n") }
                }
            }
        }
    }
}
