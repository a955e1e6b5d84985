import ArgumentParser
import BlockCore
import BlockIO
import ImageTools
import StorageDaemon

/// `merino graph`: a picture of an image's chain or of a daemon's live graph.
struct GraphCommand: ParsableCommand {
    enum Form: String, ExpressibleByArgument, CaseIterable {
        case text, dot, svg
    }

    static let configuration = CommandConfiguration(
        commandName: "graph", _superCommandName: "merino",
        abstract: "Draw the graph of an image and what is below it, or of a running daemon.",
        discussion: """
            With --qmp it is the daemon's graph as it is at this moment, exports included; else that \
            of the image with its backing chain, opened for reading.
            """)

    @Argument(help: "The image.") var file: String?
    @OptionGroup var image: ImageArguments
    @Option(help: "The QMP socket of the daemon whose graph it is.") var qmp: String?
    @Option(name: [.customShort("O"), .long], help: "text, dot or svg.") var output = Form.text

    func validate() throws {
        guard (file == nil) != (qmp == nil) else {
            throw ValidationError("give an image, or the QMP socket of a daemon with --qmp")
        }
    }

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            let picture = try picture()
            switch output {
            case .text: StandardOutput.print(picture.text)
            case .dot: StandardOutput.print(picture.dot)
            case .svg: StandardOutput.print(picture.svg)
            }
        }
    }

    private func picture() throws(BlockError) -> GraphPicture {
        if let file {
            let source = try image.source(file)
            return try ToolSession.run { session throws(BlockError) in
                let node = try await session.open(source)
                defer { node.release("command") }
                return GraphPicture(of: session.graph)
            }
        }
        let path = qmp ?? ""
        let thread = try IOThread(name: "graph")
        defer { thread.stop() }
        return try thread.runBlocking { () throws(BlockError) in
            let client = try await QMPClient.connect(to: .unix(path: path), on: thread)
            defer { client.close() }
            return try GraphPicture(
                graph: try await client.execute("x-debug-query-block-graph", [:]),
                nodes: try await client.execute("query-named-block-nodes", ["flat": true]))
        }
    }
}
