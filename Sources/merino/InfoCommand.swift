import ArgumentParser
import BlockCore
import ImageTools

/// `merino info`: what an image is, with the options of `qemu-img info`.
struct InfoCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "info", _superCommandName: "merino",
        abstract: "Say what an image is, as qemu-img info does.")

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @Option(help: "human, or json for programs.") var output = OutputFormat.human
    @Flag(name: .customLong("backing-chain"), help: "Tell of the backing images too.")
    var backingChain = false

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            let source = try image.source(file)
            let chain = backingChain
            let found = try ToolSession.run { session throws(BlockError) in
                try await ImageInfo.gather(source, chain: chain, in: session)
            }
            output.print(
                found.map(\.text).joined(separator: "\n"),
                chain ? .array(found.map(\.json)) : found.first?.json ?? .null)
        }
    }
}
