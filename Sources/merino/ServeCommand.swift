import ArgumentParser
import BlockCore
import BlockExports
import BlockGraph
import BlockIO
import ImageTools
import QMP
import StorageDaemon

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// `merino serve`: one image over NBD, with the options of `qemu-nbd(8)`.
struct ServeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "serve", _superCommandName: "merino",
        abstract: "Serve one image over NBD, as qemu-nbd does.",
        discussion: """
            It ends on SIGINT, SIGTERM or SIGHUP, or without -t when the last client has left. \
            Listening sockets of a service manager (LISTEN_FDS) take the place of -k, -p and -b.
            """)

    @Argument(help: "The image.") var file: String?
    @OptionGroup var mode: ServeMode
    @OptionGroup var opening: ServeOpening
    @OptionGroup var refused: RefusedServeOptions
    @OptionGroup var place: ExportPlace
    @Option(
        name: [.customShort("D", allowingJoined: true), .long],
        help: "What the export is, for people.")
    var description = ""
    @Option(
        name: [.customShort("e", allowingJoined: true), .long],
        help: "Clients at a time; 0 for no limit.")
    var shared = 1
    @Flag(name: [.customShort("t"), .long], help: "Go on when the last client has left.")
    var persistent = false
    @Flag(name: [.customShort("v"), .long], help: "Say what happens.")
    var verbose = false
    @Option(
        name: .customLong("handshake-limit"), help: "Seconds a client may take to negotiate.")
    var handshakeLimit = 10
    @Flag(name: [.customShort("A"), .customLong("allocation-depth")], help: "Tell how deep.")
    var allocationDepth = false
    @Option(
        name: [.customShort("B", allowingJoined: true), .long],
        help: "Offer this dirty bitmap; may be given again.")
    var bitmap: [String] = []
    @Option(name: .customLong("tls-creds"), help: "Clients must use TLS, with these credentials.")
    var tlsCredentials: String?
    @Option(name: .customLong("tls-authz"), help: "Whom the authorization object lets in.")
    var tlsAuthorization: String?
    @Option(help: "Credentials, authorization lists and secrets, with id=… and the like.")
    var object: [String] = []
    @OptionGroup var tracing: TraceArguments
    @Option(name: .customLong("pid-file"), help: "Write the process's number here when ready.")
    var pidFile: String?
    @Flag(
        name: .customLong("print-uri"), help: "Print the export's NBD URI when clients can come.")
    var printURI = false
    @Flag(name: .customLong("fork"), help: "Return when ready; go on in the background.")
    var forks = false

    func validate() throws {
        guard shared >= 0, handshakeLimit >= 0 else {
            throw ValidationError("--shared and --handshake-limit cannot be negative")
        }
        if place.socket != nil, place.hasAddress {
            throw ValidationError("--socket and --port or --bind exclude each other")
        }
        if tlsAuthorization != nil, tlsCredentials == nil {
            throw ValidationError("--tls-authz needs --tls-creds")
        }
        try mode.validate(hasFile: file != nil)
        if mode.list, isAboutAnExport {
            throw ValidationError("--list is incompatible with options of an export")
        }
        if mode.tlsHostname != nil, !mode.list || tlsCredentials == nil {
            throw ValidationError("--tls-hostname is for --list with --tls-creds")
        }
        if mode.connect != nil, place.hasSocketOrAddress {
            throw ValidationError("--connect and --socket, --port or --bind exclude each other")
        }
    }

    private var isAboutAnExport: Bool {
        place.exportName != "" || description != "" || allocationDepth || !bitmap.isEmpty
            || opening.form.format != nil || opening.offset != nil || tlsAuthorization != nil
    }

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            try refused.check()
            if try tracing.apply(strictly: true) { return }
            if let device = mode.disconnect { return try NetworkBlockDevice.disconnect(device) }
            if mode.list { return try listExports() }
            // A device stays when the command returns.
            if forks || (mode.connect != nil && !verbose), !Background.isChild {
                guard !ServiceManager.hasDescriptors else {
                    throw BlockError(
                        .invalidArgument,
                        "inherited sockets (LISTEN_FDS) are meant for this process alone: it cannot "
                            + "serve them from the background",
                        remedy: "leave out --fork: a service manager runs what it starts in the "
                            + "background")
                }
                try Background.start()
            }
            try serve()
        }
    }

    /// The objects of `--object`.
    private func objects(on thread: IOThread) async throws(BlockError) -> StorageDaemon {
        let objects = StorageDaemon(on: thread)
        for text in object { try await objects.addObject(text) }
        return objects
    }

    /// Those of `--object` that the image's options name.
    private func secrets() throws(BlockError) -> [String] {
        var result: [String] = []
        for text in object {
            let options = try KeyValue.parse(text, impliedKey: "qom-type")
            if case .string(let type)? = options["qom-type"], type.hasPrefix("secret") {
                result.append(text)
            }
        }
        return result
    }

    // MARK: List

    private func listExports() throws(BlockError) {
        let command = self
        let exports = try ToolSession.run { session throws(BlockError) in
            let objects = try await command.objects(on: session.thread)
            let credentials = try command.tlsCredentials.map { name throws(BlockError) in
                try objects.tlsCredentials(name, for: .client)
            }
            let hostname = command.mode.tlsHostname ?? command.place.connectedHost
            guard hostname != nil || credentials?.checksName != true else {
                throw BlockError(
                    .invalidArgument,
                    "a Unix socket has no host name that the server's certificate could be checked for",
                    remedy: "give the name in the certificate with --tls-hostname")
            }
            return try await NBDRemoteServer.exports(
                at: try command.place.address(connecting: true), credentials, hostname: hostname,
                on: session.thread)
        }
        StandardOutput.print(ServeMode.describe(exports))
    }

    // MARK: Serve

    private func serverOptions(
        on thread: IOThread
    ) async throws(BlockError) -> NBDServer.Options {
        var options = NBDServer.Options()
        options.connectionCountMax = shared
        options.handshakeSeconds = handshakeLimit
        let objects = try await objects(on: thread)
        if let tlsCredentials {
            options.credentials = try objects.tlsCredentials(tlsCredentials, for: .server)
        }
        if let tlsAuthorization {
            options.authorize = try objects.authorization(tlsAuthorization)
        }
        return options
    }

    private func serve() throws(BlockError) {
        let source = try opening.source(file ?? "", secrets: try secrets())
        let inherited = try ServiceManager.takeDescriptors().map(\.descriptor)
        guard inherited.isEmpty || !place.hasSocketOrAddress else {
            throw BlockError(
                .invalidArgument, "-k, -p and -b are of no use with inherited sockets",
                remedy: "leave them out, or unset LISTEN_FDS")
        }
        // Locked first, so that a second server ends before it touches anything.
        let pidFile = try self.pidFile.map { path throws(BlockError) in try PIDFile(path) }
        defer { pidFile?.remove() }
        SignalSource.block(EndingSignal.signals)
        try ToolSession.run { session throws(BlockError) in
            let ending = try EndingSignal(in: session)
            defer { ending.raise() }
            let options = try await serverOptions(on: session.thread)
            let node = try await opening.open(source, in: session)
            var bitmaps: [NBDExport.Bitmap] = []
            for name in bitmap { bitmaps.append(try .init(named: name, below: node)) }
            for found in bitmaps { await found.bitmap.load() }
            let export = try NBDExport(
                name: place.exportName, description: description, node: node,
                writable: opening.isWritable, allocationDepth: allocationDepth, bitmaps: bitmaps)
            export.edge?.isWriteThrough = source.cache.isWriteThrough
            node.release("command")
            let isVerbose = verbose
            let server = NBDServer(on: session.thread, options) { message in
                if isVerbose { StandardError.print("\(Merino.program): \(message)") }
            }
            try server.add(export)
            if mode.connect == nil { try listen(server, inherited) }
            try await serveUntilDone(server, pidFile, ending, on: session.thread)
        }
    }

    private func listen(_ server: NBDServer, _ inherited: [Int32]) throws(BlockError) {
        for descriptor in inherited {
            server.listen(
                on: try Listener(adopting: IOHandle(descriptor), thread: server.thread))
        }
        if inherited.isEmpty {
            server.listen(on: try Listener(on: try place.address(), thread: server.thread))
        }
    }

    private func serveUntilDone(
        _ server: NBDServer, _ pidFile: PIDFile?, _ ending: EndingSignal, on thread: IOThread
    ) async throws(BlockError) {
        if !persistent || mode.connect != nil { server.lastClientLeft = { ending.raise() } }
        let device = try await connectDevice(to: server)
        try pidFile?.write()
        if printURI { StandardOutput.print(try place.uri() + "\n") }
        Background.ready()
        ServiceManager.notify("READY=1\nMAINPID=\(getpid())")
        CodePages.release(after: 1, on: thread)
        await ending.wait()
        ServiceManager.notify("STOPPING=1")
        await device?.detach()
        try await server.stop()
    }

    /// The device of `--connect`, as a client of the server.
    private func connectDevice(
        to server: NBDServer
    ) async throws(BlockError) -> NetworkBlockDevice? {
        guard let path = mode.connect else { return nil }
        let device = try NetworkBlockDevice(path, on: server.thread)
        try await device.attach(to: server, place.exportName)
        if verbose { StandardError.print("\(Merino.program): \(path) is connected") }
        return device
    }
}

/// How `serve` opens its image.
struct ServeOpening: ParsableArguments {
    @OptionGroup var form: ImageFormArguments
    @Option(
        name: [.customShort("o", allowingJoined: true), .long],
        help: "Serve the image from this byte on.")
    var offset: String?
    @Flag(name: [.customShort("r"), .customLong("read-only")], help: "Let nobody write.")
    var readOnly = false
    @Flag(name: [.customShort("n"), .long], help: "The same as --cache=none.")
    var nocache = false
    @Option(help: "none, writeback, writethrough, directsync or unsafe.")
    var cache = "writeback"
    @Flag(help: "Follow nothing that the image names; its format must be given.")
    var untrusted = false
    @Option(help: "threads, native or io_uring.")
    var aio: String?
    @Option(help: "ignore or unmap.")
    var discard = "ignore"
    @Option(name: .customLong("detect-zeroes"), help: "off, on or unmap.")
    var detectZeroes: String?
    @Flag(
        name: [.customShort("s"), .long],
        help: "Write to a temporary file, which is gone at the end.")
    var snapshot = false
    @Option(
        name: [.customShort("l", allowingJoined: true), .customLong("load-snapshot")],
        help: "Serve this snapshot inside the image: snapshot.id=…, snapshot.name=…, or either.")
    var loadSnapshot: String?

    /// Whether clients may write.
    var isWritable: Bool { !readOnly && loadSnapshot == nil }

    func source(_ name: String, secrets: [String]) throws(BlockError) -> ImageSource {
        var source = form.source(name)
        source.objects = secrets
        // A temporary overlay takes the writes.
        source.isWritable = isWritable && !snapshot
        source.cache = nocache ? .none : try CacheMode(named: cache)
        source.discards = try ImageSource.discards(mode: discard)
        source.zeroDetection = detectZeroes
        source.asynchronousIO = aio
        source.isUntrusted = untrusted
        source.warnOfProbing()
        return source
    }

    /// Opens the image, held as "command".
    func open(
        _ source: ImageSource, in session: ToolSession
    ) async throws(BlockError) -> BlockNode {
        var start = 0
        if let offset { start = try ArgumentText.size(offset, "the offset") }
        guard snapshot || loadSnapshot != nil else {
            return try await session.open(source, from: start)
        }
        var node = try await session.open(source)
        if let loadSnapshot { node = try await session.openSnapshot(loadSnapshot, of: node) }
        if snapshot, isWritable {
            node = try await session.openOverlay(above: node, in: ToolSession.temporaryFolder)
        }
        if start > 0 { node = try await session.openWindow(of: node, from: start) }
        return node
    }
}

/// Options of `qemu-nbd(8)` that are not there: each is refused by its name.
struct RefusedServeOptions: ParsableArguments {
    @Option(name: [.customShort("P"), .long], help: .hidden) var partition: String?

    func check() throws(BlockError) {
        if partition != nil {
            throw BlockError(
                .unsupported, "--partition is no option of qemu-nbd any more",
                remedy: "serve the part of the image with --offset, or with --image-opts "
                    + "driver=raw,offset=…,size=…")
        }
    }
}
