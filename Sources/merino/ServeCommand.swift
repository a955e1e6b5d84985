import ArgumentParser
import BlockCore
import BlockExports
import BlockGraph
import BlockIO
import ImageTools
import StorageDaemon

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// `merino serve`: one image over NBD, with the options of `qemu-nbd(8)`.
struct ServeCommand: PassthroughCommand {
    static let configuration = CommandConfiguration(
        commandName: "serve", _superCommandName: "merino", abstract: ServeOptions.abstract)

    @Argument(
        parsing: .captureForPassthrough, help: "See merino serve --help.",
        completion: .list(ServeOptions.names))
    var arguments: [String] = []

    init() {}

    init(_ arguments: [String]) { self.arguments = arguments }

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            let options = try ServeOptions(arguments)
            if options.wantsHelp { return StandardOutput.print(ServeOptions.help) }
            if options.wantsVersion { return StandardOutput.print(Merino.line.version + "\n") }
            try ServeProgram(options: options).run()
        }
    }
}

/// What `serve` does with its options, and `export` with those that it gives it.
struct ServeProgram {
    let options: ServeOptions

    func run() throws(BlockError) {
        if try TraceArguments.apply(options.traces, strictly: true) { return }
        if options.disconnect, let device = options.file {
            return try NetworkBlockDevice.disconnect(device)
        }
        if options.list { return try listExports() }
        guard options.connect == nil || !ServiceManager.hasDescriptors else {
            throw BlockError(
                .invalidArgument,
                "--connect has the kernel as its only client: inherited sockets (LISTEN_FDS) are of "
                    + "no use with it",
                remedy: "leave out --connect, or unset LISTEN_FDS")
        }
        // A device stays when the command returns.
        if options.forks || (options.connect != nil && !options.verbose), !Background.isChild {
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

    /// The objects of `--object`.
    private func objects(on thread: IOThread) async throws(BlockError) -> StorageDaemon {
        let objects = StorageDaemon(on: thread)
        for text in options.objects { try await objects.addObject(text) }
        return objects
    }

    // MARK: List

    private func listExports() throws(BlockError) {
        let program = self
        let options = options
        let exports = try ToolSession.run { session throws(BlockError) in
            let objects = try await program.objects(on: session.thread)
            let credentials = try options.tlsCredentials.map { name throws(BlockError) in
                try objects.tlsCredentials(name, for: .client)
            }
            let hostname = options.tlsHostname ?? options.place.connectedHost
            guard hostname != nil || credentials?.checksName != true else {
                throw BlockError(
                    .invalidArgument,
                    "a Unix socket has no host name that the server's certificate could be checked for",
                    remedy: "give the name in the certificate with --tls-hostname")
            }
            let addresses = try await options.place.addresses(
                connecting: true, on: session.thread)
            return try await ExportPlace.atFirstReachable(addresses) {
                address throws(BlockError) in
                try await NBDRemoteServer.exports(
                    at: address, credentials, hostname: hostname, on: session.thread)
            }
        }
        StandardOutput.print(ExportListing.describe(exports))
    }

    // MARK: Serve

    private func serverOptions(_ objects: StorageDaemon) throws(BlockError) -> NBDServer.Options {
        var result = NBDServer.Options()
        result.connectionCountMax = options.shared ?? 1
        result.handshakeSeconds = options.handshakeLimit ?? 10
        if let credentials = options.tlsCredentials {
            result.credentials = try objects.tlsCredentials(credentials, for: .server)
        }
        if let authorization = options.tlsAuthorization {
            result.authorize = try objects.authorization(authorization)
        }
        return result
    }

    private func serve() throws(BlockError) {
        // Their files may be what is to be served: they are closed when that is open.
        let left = Background.inheritedDescriptors()
        let source = try options.source()
        let inherited = try ServiceManager.takeDescriptors().map(\.descriptor)
        guard inherited.isEmpty || !options.place.hasSocketOrAddress else {
            throw BlockError(
                .invalidArgument, "-k, -p and -b are of no use with inherited sockets",
                remedy: "leave them out, or unset LISTEN_FDS")
        }
        // Locked first, so that a second server ends before it touches anything.
        let pidFile = try options.pidFile.map { path throws(BlockError) in try PIDFile(path) }
        defer { pidFile?.remove() }
        SignalSource.block(EndingSignal.signals)
        try ToolSession.run { session throws(BlockError) in
            let ending = try EndingSignal(in: session)
            defer { ending.raise() }
            let objects = try await objects(on: session.thread)
            let serverOptions = try serverOptions(objects)
            // The image's options name them, too. Made once: what they are read from may be a pipe.
            try objects.shareObjects(with: session.graph)
            let node = try await options.open(source, in: session)
            var bitmaps: [NBDExport.Bitmap] = []
            for name in options.bitmaps { bitmaps.append(try bitmap(name, below: node)) }
            for found in bitmaps { await found.bitmap.load() }
            let export = try NBDExport(
                name: options.place.exportName ?? "", description: options.description ?? "",
                node: node, writable: options.isWritable,
                allocationDepth: options.allocationDepth, bitmaps: bitmaps)
            export.edge?.isWriteThrough = source.cache.isWriteThrough
            node.release("command")
            // Who was turned away is always told: a wrong certificate, say, is looked for at both ends.
            let server = NBDServer(on: session.thread, serverOptions) { message in
                StandardError.note("\(Merino.program): \(message)")
            }
            try server.add(export)
            if options.connect == nil { try await listen(server, inherited) }
            try await serveUntilDone(server, pidFile, ending, closing: left)
        }
    }

    private func bitmap(
        _ name: String, below node: BlockNode
    ) throws(BlockError) -> NBDExport.Bitmap {
        do throws(BlockError) {
            return try .init(named: name, below: node)
        } catch {
            guard error.code == .notFound else { throw error }
            throw BlockError(
                .notFound,
                "neither '\(node.driver.filename)' nor an image below it has a dirty bitmap "
                    + "'\(name)'",
                remedy: "'merino info' lists those in an image")
        }
    }

    private func listen(
        _ server: NBDServer, _ inherited: [Int32]
    ) async throws(BlockError) {
        for descriptor in inherited {
            server.listen(
                on: try Listener(adopting: IOHandle(descriptor), thread: server.thread))
        }
        if inherited.isEmpty {
            for listener in try await options.place.listen(on: server.thread) {
                server.listen(on: listener)
            }
        }
    }

    private func serveUntilDone(
        _ server: NBDServer, _ pidFile: PIDFile?, _ ending: EndingSignal,
        closing left: [Int32]
    ) async throws(BlockError) {
        if !options.persistent || options.connect != nil {
            server.lastClientLeft = { ending.raise() }
        }
        let device = try await connectDevice(to: server)
        try pidFile?.write()
        if options.printsURI, let address = server.addresses.first {
            let usesTLS = options.tlsCredentials != nil
            StandardOutput.print(try options.place.uri(at: address, usesTLS: usesTLS) + "\n")
        }
        try Background.ready(closing: left)
        ServiceManager.notify("READY=1\nMAINPID=\(getpid())")
        CodePages.release(after: 1, on: server.thread)
        await ending.wait()
        ServiceManager.notify("STOPPING=1")
        await device?.detach()
        try await server.stop()
    }

    /// The device of `--connect`, as a client of the server.
    private func connectDevice(
        to server: NBDServer
    ) async throws(BlockError) -> NetworkBlockDevice? {
        guard let path = options.connect else { return nil }
        let device = try NetworkBlockDevice(path, on: server.thread)
        try await device.attach(to: server, options.place.exportName ?? "")
        if options.verbose { StandardError.print("\(Merino.program): \(path) is connected") }
        return device
    }
}
