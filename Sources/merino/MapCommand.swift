import ArgumentParser
import BlockCore
import ImageTools

/// `merino map`: where an image's data lies, with the options of `qemu-img map`.
struct MapCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "map", _superCommandName: "merino",
        abstract: "Say where an image's data lies, as qemu-img map does.")

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @Option(help: "human, or json for programs.") var output = OutputFormat.human
    @Option(
        name: [.customShort("s", allowingJoined: true), .customLong("start-offset")],
        help: "Begin here.")
    var start = "0"
    @Option(
        name: [.customShort("l", allowingJoined: true), .customLong("max-length")],
        help: "So many bytes.")
    var length: String?

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            let source = try image.source(file)
            let first = try ArgumentText.size(start, "the start offset")
            var count: Int?
            if let length { count = try ArgumentText.size(length, "the length") }
            let (wanted, isJSON) = (count ?? .max, output == .json)
            try ToolSession.run { session throws(BlockError) in
                let edge = try await session.use(source, as: "image map")
                let end = ImageMap.end(of: edge)
                let begin = min(first, end)
                let range = ByteRange(begin, min(wanted, end - begin))
                var failure: BlockError?
                var isFirst = true
                var lines = OutputText()
                lines.append(isJSON ? "[" : ImageMap.Entry.heading)
                try await ImageMap.walk(edge, range) { entry in
                    // Many lines at once: a fragmented image has a million of them.
                    if lines.bytes.count >= 1 << 16 {
                        StandardOutput.print(lines.bytes)
                        lines.removeAll()
                    }
                    if isJSON {
                        if !isFirst { lines.append(literal: ",\n") }
                        isFirst = false
                        entry.appendJSON(to: &lines)
                        return
                    }
                    do throws(BlockError) {
                        if failure == nil { try entry.appendLine(to: &lines) }
                    } catch { failure = failure ?? error }
                }
                if isJSON {
                    if isFirst { ImageMap.Entry.nothing(at: first).appendJSON(to: &lines) }
                    lines.append("]\n")
                }
                StandardOutput.print(lines.bytes)
                try await session.graph.detach(edge)
                if let failure { throw failure }
            }
        }
    }
}
