import ArgumentParser
import BlockCore
import ImageTools

/// `merino inspect`: what an image that nobody vouches for is.
struct InspectCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "inspect", _superCommandName: "merino",
        abstract: "Say what an untrusted image is, opening nothing but it.",
        discussion: """
            Files that the image names (a backing file, a data file) are told, never opened. The \
            format that is found is what the image looks like: give it with -f once you believe it.
            """)

    @Argument(help: "The image: a path.") var file: String
    @Option(help: "human, or json for programs.") var output = OutputFormat.human

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            let path = file
            let found = try ToolSession.run { session throws(BlockError) in
                try await ImageInspection.gather(path, in: session)
            }
            output.print(found.text, found.json)
        }
    }
}
