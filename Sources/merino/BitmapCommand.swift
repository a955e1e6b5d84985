import ArgumentParser
import BlockCore
import ImageTools

/// `merino bitmap`: the dirty bitmaps that an image keeps, with the options of `qemu-img bitmap`.
struct BitmapCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "bitmap", _superCommandName: "merino",
        abstract: "Add, remove or change a dirty bitmap of an image, as qemu-img bitmap does.",
        discussion: """
            Actions are carried out in the order in which they are given, and each may be given \
            again. Only qcow2 images of version 3 keep bitmaps.
            """)

    enum Plain: String, EnumerableFlag {
        case add, remove, clear, enable, disable

        static func help(for value: Plain) -> ArgumentHelp? {
            switch value {
            case .add: "Make the bitmap; it records from then on."
            case .remove: "Take it out of the image."
            case .clear: "All of it is clean."
            case .enable: "It records what changes."
            case .disable: "It does not record."
            }
        }

        var action: ImageBitmap.Action {
            switch self {
            case .add: .add
            case .remove: .remove
            case .clear: .clear
            case .enable: .enable
            case .disable: .disable
            }
        }
    }

    @Argument(help: "The image.") var file: String?
    @Argument(help: "The bitmap's name.") var bitmap: String?
    @OptionGroup var image: ImageArguments
    @Flag var plain: [Plain] = []
    @Option(help: "Mark what is dirty in this bitmap too.") var merge: [String] = []
    @Option(
        name: [.customShort("g", allowingJoined: true), .long],
        help: "With --add: bytes that one bit stands for, a power of two from 512 to 2G.")
    var granularity: String?
    @Option(
        name: [.customShort("b", allowingJoined: true), .customLong("source-file")],
        help: "With --merge: the image that has the bitmaps to merge.")
    var sourceFile: String?
    @Option(
        name: [.customShort("F", allowingJoined: true), .customLong("source-format")],
        help: "The format of that image.")
    var sourceFormat: String?

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            guard let file, let bitmap else {
                throw BlockError(.invalidArgument, "the <file> and the <bitmap> are missing")
            }
            var change = ImageBitmap(try image.source(file), bitmap: bitmap)
            change.actions = actions(Merino.line.arguments)
            if let granularity {
                change.granularity = try ArgumentText.size(granularity, "the granularity")
            }
            if let sourceFile {
                change.mergeSource = ImageSource(sourceFile, format: sourceFormat)
            } else if sourceFormat != nil {
                throw BlockError(.invalidArgument, "-F is for the format of -b")
            }
            try change.check()
            let wanted = change
            try ToolSession.run { session throws(BlockError) in
                try await wanted.run(in: session)
            }
        }
    }

    /// All actions in the order of the command line, which flags and options keep for themselves only.
    private func actions(_ words: [String]) -> [ImageBitmap.Action] {
        var plain = plain[...]
        var merge = merge[...]
        var result: [ImageBitmap.Action] = []
        for word in words.prefix(while: { $0 != "--" }) {
            if word == "--merge" || word.hasPrefix("--merge=") {
                if let name = merge.popFirst() { result.append(.merge(name)) }
            } else if let first = plain.first, word == "--\(first.rawValue)" {
                plain.removeFirst()
                result.append(first.action)
            }
        }
        return result
    }
}
