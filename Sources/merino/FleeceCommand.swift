import ArgumentParser
import BlockCore
import BlockIO
import QMP
import StorageDaemon

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// `merino fleece`: a frozen, exported view of a live disk, in one command.
struct FleeceCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "fleece", _superCommandName: "merino",
        abstract: "Freeze a live disk and export the frozen view until Ctrl-C.",
        discussion: """
            The disk is a node of a running daemon (--qmp), or an image file, which is then served \
            by this command itself: writable as 'live', frozen as 'live-frozen'. Guests go on \
            writing; what they overwrite is copied to a temporary image first. When the command ends, \
            everything is taken down again, the temporary image included.
            """)

    @Argument(help: "The node to freeze; without --qmp, an image file.") var disk: String
    @Option(help: "The daemon's QMP socket.") var qmp: String?
    @Option(name: [.customShort("f"), .long], help: "The format of the image file.")
    var format = "raw"
    @Option(
        name: .customLong("nbd-socket"),
        help: "Start the NBD server here if none runs; --stop leaves it.")
    var nbdSocket: String?
    @Option(name: .customLong("export-name"), help: "The name of the frozen export.")
    var exportName: String?
    @Option(help: "The temporary image, removed at the end; default: in TMPDIR, or /var/tmp.")
    var temp: String?
    @Option(name: .customLong("temp-format"), help: "raw or qcow2.") var tempFormat = "raw"
    @Option(
        name: .customLong("on-cbw-error"),
        help: "When copying fails: break-snapshot (guests go on) or break-guest-write.")
    var onError = "break-snapshot"
    @Option(
        name: .customLong("cbw-timeout"),
        help: "Seconds a guest's write waits for a copy at most; 0 for no limit.")
    var timeout = 0
    @Flag(help: "Set the view up and return; --stop takes it down.") var detach = false
    @Flag(help: "Take down the view of the disk that is held.") var stop = false

    func validate() throws {
        guard ["break-snapshot", "break-guest-write"].contains(onError) else {
            throw ValidationError("--on-cbw-error takes break-snapshot or break-guest-write")
        }
        guard timeout >= 0, timeout <= Int(UInt32.max) else {
            throw ValidationError("--cbw-timeout is out of bounds")
        }
        if qmp == nil, detach || stop {
            throw ValidationError("--detach and --stop are for the disk of a daemon: give --qmp")
        }
    }

    func run() throws {
        let signal: Int32?
        do {
            SignalSource.block(FleeceInterruption.signals)
            let thread = try IOThread(name: "fleece")
            defer { thread.stop() }
            let interruption = try FleeceInterruption(on: thread)
            signal = try thread.runBlocking { () throws(BlockError) in
                try await work(interruption, on: thread)
            }
        } catch {
            throw Failure(error.description)
        }
        if let signal { throw ExitCode(128 + signal) }
    }

    /// - Returns: the signal that came before the view was set up.
    private func work(
        _ interruption: FleeceInterruption, on thread: IOThread
    ) async throws(BlockError) -> Int32? {
        do throws(BlockError) {
            if let qmp {
                let client = try await QMPClient.connect(to: .unix(path: qmp), on: thread)
                interruption.client = client
                try await fleece(node: disk, client, interruption)
                client.close()
            } else {
                try await fleeceFile(on: thread, interruption)
            }
            return nil
        } catch {
            guard error.code == .cancelled, let signal = interruption.signal else { throw error }
            return signal
        }
    }

    // MARK: A daemon's disk

    private func fleece(
        node: String, _ executor: any QMPExecutor, _ interruption: FleeceInterruption
    ) async throws(BlockError) {
        let path = temporaryPath
        let session = FleeceSession(
            of: node, exportName: exportName, temporaryPath: path, executor: executor)
        if stop {
            try await takeDown(session, interruption)
            return
        }
        var options = FleeceSession.Options()
        options.breaksSnapshot = onError == "break-snapshot"
        options.timeoutSeconds = timeout
        options.temporaryFormat = tempFormat
        options.owner = daemonOwner
        // A server may be started.
        if nbdSocket != nil { interruption.endsAtOnce = false }
        let (uri, startedServer) = try await FleeceSession.address(
            of: session.exportName, socket: nbdSocket, executor: executor)
        interruption.endsAtOnce = false
        do throws(BlockError) {
            try interruption.check()
            try await session.begin(options)
        } catch {
            if startedServer { try? await FleeceSession.stopServer(executor) }
            throw error
        }
        if detach, interruption.signal != nil {
            try await end(session, startedServer, nil, interruption)
            try interruption.check()
        }
        print("frozen: \(node)")
        print("uri: \(uri)")
        if detach {
            print("temporary image: \(path)")
            if startedServer {
                print("NBD server: stays after --stop; nbd-server-stop stops it")
            }
            return
        }
        print("Ctrl-C ends the view.")
        fflush(nil)
        var failure: BlockError?
        do throws(BlockError) {
            try await watch(session, interruption, on: executor.thread)
        } catch { failure = error }
        try await end(session, startedServer, failure, interruption)
        print("ended: \(node); the temporary image is removed")
    }

    /// Ends the view that this command set up.
    ///
    /// - Parameter loss: why it ends, unless it was asked to.
    private func end(
        _ session: FleeceSession, _ startedServer: Bool, _ loss: BlockError?,
        _ interruption: FleeceInterruption
    ) async throws(BlockError) {
        var failure = loss
        do throws(BlockError) {
            try await session.end()
        } catch { failure = failure ?? error }
        if startedServer { try? await FleeceSession.stopServer(session.executor) }
        if let failure, let client = interruption.client, client.isBroken {
            throw await outOfReach(session, client, failure)
        }
        Self.removeFile(session.temporaryPath)
        if let failure { throw failure }
    }

    /// Says what becomes of the view when its daemon cannot be asked any more.
    private func outOfReach(
        _ session: FleeceSession, _ client: QMPClient, _ failure: BlockError
    ) async -> BlockError {
        if failure.code != .timedOut, let qmp, await isGone(qmp, client.thread) {
            Self.removeFile(session.temporaryPath)
            return BlockError(
                failure.code, failure.message,
                remedy:
                    "the frozen view of '\(session.disk)' ended with it, the temporary image is removed"
            )
        }
        return BlockError(
            failure.code, failure.message,
            remedy:
                "the frozen view of '\(session.disk)' may still be held: --stop ends it, and removes "
                + "the temporary image '\(session.temporaryPath)'")
    }

    private func isGone(_ daemon: String, _ thread: IOThread) async -> Bool {
        do throws(BlockError) {
            let client = try await QMPClient.connect(
                to: .unix(path: daemon), on: thread, nanosecondsMax: 5_000_000_000)
            client.close()
            return false
        } catch {
            return error.code == .disconnected
                || [ECONNREFUSED, ENOENT].contains(error.systemError)
        }
    }

    private func takeDown(
        _ session: FleeceSession, _ interruption: FleeceInterruption
    ) async throws(BlockError) {
        guard try await session.isActive() else {
            let left = try await session.leftNodes().joined(separator: ", ")
            throw BlockError(
                .notFound, "no frozen view of '\(session.disk)' is held",
                remedy: left.isEmpty ? nil : "blockdev-del removes what is left of one: \(left)")
        }
        let path = try await session.knownTemporaryPath()
        interruption.endsAtOnce = false
        try await session.end()
        // A relative path is the daemon's, in a folder of its own.
        if let path, path.hasPrefix("/") { Self.removeFile(path) }
        print("ended: \(session.disk); the temporary image is removed")
    }

    /// Shows how much is copied until a signal comes, or the view is lost.
    private func watch(
        _ session: FleeceSession, _ interruption: FleeceInterruption, on thread: IOThread
    ) async throws(BlockError) {
        let isTerminal = isatty(1) == 1
        var shown = -1
        var isLast = false
        // The last look comes after the signal: it tells how much it was in the end.
        while !isLast {
            isLast = interruption.signal != nil
            let progress = try await session.progress()
            if let breakage = progress.breakage {
                throw BlockError(.inputOutput, "the frozen view is lost: \(breakage)")
            }
            if progress.copiedBytes != shown {
                shown = progress.copiedBytes
                let text = "copied: \(SizeText.format(shown))"
                print(isTerminal ? "\r\u{1b}[K\(text)" : text, terminator: isTerminal ? "" : "\n")
                fflush(nil)
            }
            for _ in 0..<10 where interruption.signal == nil {
                await thread.sleep(nanoseconds: 50_000_000)
            }
        }
        if isTerminal { print() }
    }

    private static var temporaryFolder: String {
        // Relative, it would be another folder to the daemon.
        let folder = getenv("TMPDIR").map { String(cString: $0) } ?? ""
        return folder.hasPrefix("/") ? folder : "/var/tmp"
    }

    /// Where the temporary image is made: absolute, for the daemon has a working directory of its own.
    private var temporaryPath: String {
        guard let temp else {
            let number = String(UInt64.random(in: 0 ... .max), radix: 36)
            return "\(Self.temporaryFolder)/merino-fleece-\(getpid())-\(number).img"
        }
        return WorkingFolder.absolute(temp)
    }

    /// The daemon's user, to whom the temporary image is given: its socket tells who that is.
    private var daemonOwner: FleeceSession.Owner? {
        var daemon = stat()
        guard let qmp, geteuid() == 0, stat(qmp, &daemon) == 0, daemon.st_uid != 0 else {
            return nil
        }
        return FleeceSession.Owner(user: daemon.st_uid, group: daemon.st_gid)
    }

    private static func removeFile(_ path: String) {
        if unlink(path) != 0, errno != ENOENT {
            StandardError.print("merino: cannot remove the temporary image '\(path)'")
        }
    }

    // MARK: An image file

    private func fleeceFile(
        on thread: IOThread, _ interruption: FleeceInterruption
    ) async throws(BlockError) {
        interruption.endsAtOnce = false
        let daemon = StorageDaemon(on: thread)
        do throws(BlockError) {
            let socket = nbdSocket ?? Self.temporaryFolder + "/merino-fleece-\(getpid()).sock"
            _ = try await daemon.execute(
                "nbd-server-start",
                ["addr": ["type": "unix", "data": ["path": .string(socket)]]])
            _ = try await daemon.execute(
                "blockdev-add",
                [
                    "driver": .string(format), "node-name": "live", "discard": "unmap",
                    "file": ["driver": "file", "filename": .string(disk)],
                ])
            _ = try await daemon.execute(
                "block-export-add",
                ["type": "nbd", "id": "live", "node-name": "live", "writable": true])
            print(
                "live: "
                    + (try await FleeceSession.address(of: "live", socket: nil, executor: daemon)
                        .uri))
            try await fleece(node: "live", daemon, interruption)
        } catch {
            try? await daemon.close()
            throw error
        }
        try await daemon.close()
    }
}
