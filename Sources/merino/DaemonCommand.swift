import ArgumentParser
import BlockCore
import BlockIO
import StorageDaemon

/// `merino daemon`: the storage daemon, with the options of `qemu-storage-daemon(1)`.
struct DaemonCommand: PassthroughCommand {
    static let configuration = CommandConfiguration(
        commandName: "daemon", _superCommandName: "merino",
        abstract: "Serve disk images, controlled over QMP.")

    // The order of the options counts, so that they are parsed by their own rules.
    @Argument(
        parsing: .captureForPassthrough, help: "See merino daemon --help.",
        completion: .list(DaemonOptions.names))
    var arguments: [String] = []

    init() {}

    init(_ arguments: [String]) { self.arguments = arguments }

    func run() throws {
        do {
            try runDaemon()
        } catch {
            throw Failure(error.description)
        }
    }

    private func runDaemon() throws(BlockError) {
        let options = try DaemonOptions(arguments)
        if options.wantsHelp { return print(DaemonOptions.help) }
        if let listing = options.listing { return print(listing) }
        if options.wantsVersion { return print(Merino.configuration.version) }
        if try TraceArguments.apply(options.traces, strictly: true) { return }
        SignalSource.block(DaemonProgram.signals)
        let inherited = try ServiceManager.takeDescriptors()
        let notice: @Sendable (String) -> Void = { StandardOutput.print($0) }
        guard options.daemonizes else {
            return try DaemonProgram.run(options, inherited, notice: notice) {
                () throws(BlockError) in
            }
        }
        let daemonization = try Daemonization.begin()
        try DaemonProgram.run(options, inherited, notice: notice) { () throws(BlockError) in
            try daemonization.ready()
        }
    }
}
