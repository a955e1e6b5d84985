import ArgumentParser

/// The command: one subcommand per job.
@main struct Merino: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "merino",
        abstract: "A block-storage engine: disk images, live snapshots, NBD.",
        version: "merino 0.1.0",
        subcommands: [DaemonCommand.self, ServeCommand.self, FleeceCommand.self])
}
