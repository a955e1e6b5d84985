import BlockCore
import BlockIO
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A run of the daemon: carries out the command line, serves until it is told to end, and ends
/// cleanly. Confined to its thread, but for ``run(_:ready:)``.
public final class DaemonProgram: @unchecked Sendable {
    /// What ends the daemon. Blocked in all threads before any is started.
    public static let signals = [SIGINT, SIGTERM, SIGHUP]

    private let daemon: StorageDaemon
    private let monitors: MonitorServer
    private let thread: IOThread
    private var isEnding = false
    private let ending = WakeUp()

    private let notice: @Sendable (String) -> Void

    private init(on thread: IOThread, _ notice: @escaping @Sendable (String) -> Void) {
        self.thread = thread
        self.notice = notice
        daemon = StorageDaemon(on: thread)
        monitors = MonitorServer(for: daemon)
        daemon.quit = { [weak self] in self?.end() }
        daemon.log = { line in
            let text = "merino: \(line)\n"
            _ = text.withCString { write(2, $0, strlen($0)) }
        }
    }

    /// Runs the daemon until `quit` or a signal.
    ///
    /// - Parameters:
    ///   - inherited: open files that a service manager handed over; options refer to them by name.
    ///   - notice: takes what is to be printed: lines that tell the names of new terminals.
    ///   - ready: called when everything is set up.
    /// - Throws: the first failure to set up; or, at the end, to make something durable.
    public static func run(
        _ options: DaemonOptions, _ inherited: [ServiceManager.Inherited] = [],
        notice: @escaping @Sendable (String) -> Void = { _ in },
        ready: @escaping @Sendable () throws(BlockError) -> Void
    ) throws(BlockError) {
        // Locked first, so that a second daemon ends before it touches anything.
        let pidFile = try options.pidFile.map { path throws(BlockError) in try PIDFile(path) }
        defer { pidFile?.remove() }
        let thread = try IOThread(name: "merino-daemon")
        defer { thread.stop() }
        try thread.runBlocking { () async throws(BlockError) in
            let program = DaemonProgram(on: thread, notice)
            for file in inherited where !file.name.isEmpty {
                program.daemon.inheritedDescriptors[file.name] = file.descriptor
            }
            let signals = try SignalSource(Self.signals, on: thread)
            thread.spawn {
                if await signals.next() != nil { program.end() }
            }
            let result = await program.serve(options) { () throws(BlockError) in
                try pidFile?.write()
                try ready()
                ServiceManager.notify("READY=1\nMAINPID=\(getpid())")
            }
            signals.cancel()
            try result.get()
        }
    }

    private func serve(
        _ options: DaemonOptions, ready: @Sendable () throws(BlockError) -> Void
    ) async -> Result<Void, BlockError> {
        var failure: BlockError?
        do throws(BlockError) {
            for step in options.steps where !isEnding { try await carryOut(step) }
            if !isEnding { try ready() }
            CodePages.release(after: 1, on: thread)
            while !isEnding { await ending.wait() }
        } catch {
            // A wait for a client that a signal ends is no failure.
            if !isEnding { failure = error }
        }
        ServiceManager.notify("STOPPING=1")
        for device in daemon.characterDevices.values { device.close() }
        monitors.stopListening()
        await daemon.turns.take()
        do throws(BlockError) { try await daemon.close() } catch { failure = failure ?? error }
        daemon.turns.pass()
        await monitors.stop()
        return failure.map { .failure($0) } ?? .success(())
    }

    private func end() {
        isEnding = true
        daemon.graph.endLongWork()
        for device in daemon.characterDevices.values { device.stopWaiting() }
        ending.wake()
    }

    // MARK: Steps

    private func carryOut(_ step: DaemonOptions.Step) async throws(BlockError) {
        do throws(BlockError) {
            switch step {
            case .object(let options): _ = try await daemon.objectAdd(options)
            case .blockdev(let options):
                guard options["node-name"] != nil else {
                    throw BlockError(.invalidArgument, "option 'node-name' is missing")
                }
                _ = try await daemon.blockdevAdd(options)
            case .nbdServer(let options): _ = try await daemon.nbdServerStart(options)
            case .export(let options): _ = try await daemon.blockExportAdd(options)
            case .characterDevice(let options): try await addDevice(options)
            case .monitor(let options): try addMonitor(options)
            }
        } catch {
            throw BlockError(error.code, "\(step.option): \(error.description)")
        }
    }

    private func addDevice(_ options: JSONValue) async throws(BlockError) {
        let device = try await daemon.addCharacterDevice(options)
        if let terminal = (device as? DescriptorDevice)?.terminalName,
            case .string(let label)? = options["id"]
        {
            // Scripts read the name from this line.
            notice("char device redirected to \(terminal) (label \(label))\n")
        }
        try await device.waitForClient()
    }

    private func addMonitor(_ options: JSONValue) throws(BlockError) {
        let reader = try OptionReader(options, of: "the monitor")
        let identifier = try reader.required("chardev")
        _ = try reader.string("id")
        let mode = try reader.string("mode") ?? "control"
        let isPretty = try reader.bool("pretty") ?? false
        try reader.finish()
        guard mode == "control" else {
            throw BlockError(
                .unsupported, "monitor mode '\(mode)' is not supported", remedy: "use mode=control")
        }
        guard let device = daemon.characterDevices[identifier] else {
            throw BlockError(
                .notFound, "there is no character device '\(identifier)'",
                remedy: "give its --chardev before --monitor")
        }
        try device.attach(to: monitors, isPretty: isPretty)
    }
}
