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
    @Option(name: .customLong("nbd-socket"), help: "Start the NBD server here if none runs.")
    var nbdSocket: String?
    @Option(name: .customLong("export-name"), help: "The name of the frozen export.")
    var exportName: String?
    @Option(help: "The temporary image; default: beside the sockets, removed at the end.")
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
        do {
            SignalSource.block([SIGINT, SIGTERM, SIGHUP])
            let thread = try IOThread(name: "fleece")
            defer { thread.stop() }
            try thread.runBlocking { () throws(BlockError) in
                if let qmp {
                    let client = try await QMPClient.connect(to: .unix(path: qmp), on: thread)
                    try await fleece(node: disk, client)
                    client.close()
                } else {
                    try await fleeceFile(on: thread)
                }
            }
        } catch {
            throw Failure(error.description)
        }
    }

    // MARK: A daemon's disk

    private func fleece(node: String, _ executor: any QMPExecutor) async throws(BlockError) {
        let path = try temporaryPath()
        let session = FleeceSession(
            of: node, exportName: exportName, temporaryPath: path, executor: executor)
        if stop {
            try await takeDown(session)
            return
        }
        var options = FleeceSession.Options()
        options.breaksSnapshot = onError == "break-snapshot"
        options.timeoutSeconds = timeout
        options.temporaryFormat = tempFormat
        let (uri, startedServer) = try await FleeceSession.address(
            of: session.exportName, socket: nbdSocket, executor: executor)
        options.owner = daemonOwner
        do throws(BlockError) {
            try await session.begin(options)
        } catch {
            if startedServer { _ = try? await executor.execute("nbd-server-stop", [:]) }
            throw error
        }
        print("frozen: \(node)")
        print("uri: \(uri)")
        if detach {
            print("temporary image: \(path)")
            return
        }
        print("Ctrl-C ends the view.")
        fflush(nil)
        var failure: BlockError?
        do throws(BlockError) {
            try await watch(session, on: executor.thread)
        } catch { failure = error }
        do throws(BlockError) {
            try await session.end()
        } catch { failure = failure ?? error }
        if startedServer { _ = try? await executor.execute("nbd-server-stop", [:]) }
        Self.removeFile(path)
        if let failure { throw failure }
        print("ended: \(node); the temporary image is removed")
    }

    private func takeDown(_ session: FleeceSession) async throws(BlockError) {
        guard try await session.isActive() else {
            let left = try await session.leftNodes().joined(separator: ", ")
            throw BlockError(
                .notFound, "no frozen view of '\(session.disk)' is held",
                remedy: left.isEmpty ? nil : "blockdev-del removes what is left of one: \(left)")
        }
        let path = try await session.knownTemporaryPath()
        try await session.end()
        // A relative path is the daemon's, in a folder of its own.
        if let path, path.hasPrefix("/") { Self.removeFile(path) }
        print("ended: \(session.disk); the temporary image is removed")
    }

    /// Shows how much is copied until a signal comes, or the view is lost.
    private func watch(_ session: FleeceSession, on thread: IOThread) async throws(BlockError) {
        let signals = try SignalSource([SIGINT, SIGTERM, SIGHUP], on: thread)
        let end = EndFlag()
        thread.spawn {
            _ = await signals.next()
            end.isSet = true
        }
        let isTerminal = isatty(1) == 1
        var shown = -1
        var isLast = false
        // The last look comes after the signal: it tells how much it was in the end.
        while !isLast {
            isLast = end.isSet
            let progress = try await session.progress()
            if let breakage = progress.breakage {
                signals.cancel()
                throw BlockError(.inputOutput, "the frozen view is lost: \(breakage)")
            }
            if progress.copiedBytes != shown {
                shown = progress.copiedBytes
                let text = "copied: \(SizeText.format(shown))"
                print(isTerminal ? "\r\u{1b}[K\(text)" : text, terminator: isTerminal ? "" : "\n")
                fflush(nil)
            }
            for _ in 0..<10 where !end.isSet { await thread.sleep(nanoseconds: 50_000_000) }
        }
        if isTerminal { print() }
    }

    private final class EndFlag: @unchecked Sendable {
        var isSet = false
    }

    private static var temporaryFolder: String {
        // Relative, it would be another folder to the daemon.
        let folder = getenv("TMPDIR").map { String(cString: $0) } ?? ""
        return folder.hasPrefix("/") ? folder : "/var/tmp"
    }

    /// Where the temporary image is made: absolute, for the daemon has a working directory of its own.
    private func temporaryPath() throws(BlockError) -> String {
        guard let temp else {
            let number = String(UInt64.random(in: 0 ... .max), radix: 36)
            return "\(Self.temporaryFolder)/merino-fleece-\(getpid())-\(number).img"
        }
        if temp.hasPrefix("/") { return temp }
        guard let folder = getcwd(nil, 0) else {
            throw .system("cannot tell the working directory", errno)
        }
        defer { free(folder) }
        return String(cString: folder) + "/" + temp
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

    private func fleeceFile(on thread: IOThread) async throws(BlockError) {
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
            try await fleece(node: "live", daemon)
        } catch {
            try? await daemon.close()
            throw error
        }
        try await daemon.close()
    }
}
