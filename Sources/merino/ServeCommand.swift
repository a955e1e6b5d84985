import ArgumentParser
import BlockCore
import BlockExports
import BlockGraph
import BlockIO
import ImageTools

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// `merino serve`: one image over NBD, with the options of `qemu-nbd(8)`.
struct ServeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "serve", abstract: "Serve one image over NBD, as qemu-nbd does.")

    @Argument(help: "The image.") var file: String
    @Option(
        name: [.customShort("f"), .long], help: "The image's format; found out when not given.")
    var format: String?
    @Option(name: [.customShort("k"), .long], help: "Listen on this Unix socket.")
    var socket: String?
    @Option(name: [.customShort("p"), .long], help: "Listen on this TCP port.")
    var port: UInt16 = 10809
    @Option(name: [.customShort("b"), .long], help: "Listen on this address.")
    var bind = "0.0.0.0"
    @Option(name: [.customShort("x"), .customLong("export-name")], help: "The export's name.")
    var exportName = ""
    @Option(name: [.customShort("D"), .long], help: "What the export is, for people.")
    var description = ""
    @Option(
        name: [.customShort("e"), .long], help: "Clients at a time; 0 for no limit.")
    var shared = 1
    @Flag(name: [.customShort("t"), .long], help: "Go on when the last client has left.")
    var persistent = false
    @Flag(name: [.customShort("r"), .customLong("read-only")], help: "Let nobody write.")
    var readOnly = false
    @Flag(name: [.customShort("v"), .long], help: "Say what happens.")
    var verbose = false
    @Flag(name: [.customShort("n"), .long], help: "The same as --cache=none.")
    var nocache = false
    @Option(help: "none, writeback, writethrough, directsync or unsafe.")
    var cache = "writeback"
    @Option(help: "threads, native or io_uring.")
    var aio: String?
    @Option(help: "ignore or unmap.")
    var discard = "ignore"
    @Option(name: .customLong("detect-zeroes"), help: "off, on or unmap.")
    var detectZeroes: String?
    @Option(
        name: .customLong("handshake-limit"), help: "Seconds a client may take to negotiate.")
    var handshakeLimit = 10
    @Flag(name: [.customShort("A"), .customLong("allocation-depth")], help: "Tell how deep.")
    var allocationDepth = false
    @Option(name: .customLong("pid-file"), help: "Write the process's number here when ready.")
    var pidFile: String?

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in try serve() }
    }

    private var source: ImageSource {
        get throws(BlockError) {
            var source = ImageSource(file, format: format)
            source.isWritable = !readOnly
            source.cache = nocache ? .none : try CacheMode(named: cache)
            source.discards = try ImageSource.discards(mode: discard)
            source.zeroDetection = detectZeroes
            source.asynchronousIO = aio
            return source
        }
    }

    private func serve() throws(BlockError) {
        let source = try source
        SignalSource.block([SIGINT, SIGTERM, SIGHUP])
        try ToolSession.run { session throws(BlockError) in
            let node = try await session.open(source)
            let export = try NBDExport(
                name: exportName, description: description, node: node, writable: !readOnly,
                allocationDepth: allocationDepth)
            node.release("command")
            var options = NBDServer.Options()
            options.connectionCountMax = shared
            options.handshakeSeconds = handshakeLimit
            let isVerbose = verbose
            let server = NBDServer(on: session.thread, options) { message in
                if isVerbose { StandardError.print("\(Merino.program): \(message)") }
            }
            try server.add(export)
            server.listen(on: try Listener(on: try address(), thread: session.thread))
            CodePages.release(after: 1, on: session.thread)
            let signals = try SignalSource([SIGINT, SIGTERM, SIGHUP], on: session.thread)
            if !persistent { server.lastClientLeft = { signals.cancel() } }
            _ = await signals.next()
            try await server.stop()
        }
    }

    private func address() throws(BlockError) -> SocketAddress {
        if let socket { return .unix(path: socket) }
        guard
            let first = try SocketAddress.resolve(host: bind, port: port, passive: true).first
        else { throw BlockError(.notFound, "cannot resolve '\(bind)'") }
        return first
    }
}
