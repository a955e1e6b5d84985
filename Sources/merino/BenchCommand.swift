import ArgumentParser
import BlockCore
import ImageTools

/// `merino bench`: times requests, with the options of `qemu-img bench`.
struct BenchCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "bench", _superCommandName: "merino",
        abstract: "Time reads or writes of an image, as qemu-img bench does.")

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @Option(name: [.customShort("c", allowingJoined: true), .long], help: "Requests in all.")
    var count = 75_000
    @Option(name: [.customShort("d", allowingJoined: true), .long], help: "At the same time.")
    var depth = 64
    @Option(name: [.customShort("o", allowingJoined: true), .long], help: "Where to begin.")
    var offset = "0"
    @Option(
        name: [.customShort("s", allowingJoined: true), .customLong("buffer-size")],
        help: "Bytes of a request.")
    var bufferSize = "4k"
    @Option(
        name: [.customShort("S", allowingJoined: true), .customLong("step-size")],
        help: "From one request to the next; a request's size when not given.")
    var stepSize: String?
    @Flag(name: [.customShort("w"), .long], help: "Write; else read.") var write = false
    @Option(help: "The byte that is written.") var pattern: UInt8 = 0
    @Option(name: .customLong("flush-interval"), help: "Flush after so many writes.")
    var flushInterval = 0
    @Flag(name: .customLong("no-drain"), help: "Flush while writes are under way.")
    var noDrain = false
    @Option(
        name: [.customShort("t", allowingJoined: true), .long],
        help: "none, writeback, writethrough, directsync or unsafe.")
    var cache = "writeback"
    @Option(
        name: [.customShort("i", allowingJoined: true), .long],
        help: "threads, native or io_uring.")
    var aio: String?
    @Flag(name: [.customShort("n"), .long], help: "The same as -i native.") var native = false
    @Flag(name: [.customShort("q"), .long], help: "Say nothing but errors and results.")
    var quiet = false

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            var source = try image.source(file)
            source.cache = try CacheMode(named: cache)
            source.asynchronousIO = aio ?? (native && source.cache.isDirect ? "native" : nil)
            source.warnOfProbing()
            var bench = ImageBench(source)
            bench.count = count
            bench.depth = depth
            bench.offset = try ArgumentText.size(offset, "the offset")
            bench.bufferSize = try ArgumentText.size(bufferSize, "the buffer size")
            if let stepSize { bench.step = try ArgumentText.size(stepSize, "the step size") }
            bench.writes = write
            bench.pattern = pattern
            bench.flushInterval = flushInterval
            bench.drains = !noDrain
            let work = bench
            let time = try ToolSession.run { session throws(BlockError) in
                try await work.run(in: session) { StandardOutput.print($0) }
            }
            StandardOutput.print(ImageBench.result(time))
        }
    }
}
