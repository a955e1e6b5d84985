import ArgumentParser
import BlockCore
import StorageDaemon

/// What is told at trace events, for commands on images.
struct TraceArguments: ParsableArguments {
    @Option(
        name: [.customShort("T", allowingJoined: true), .long],
        help: "Tell what happens at trace events: [PATTERN][,events=FILE][,file=FILE], or help.")
    var trace: [String] = []

    /// - Returns: whether only the list of events was asked for.
    func apply() throws(BlockError) -> Bool {
        try Self.apply(trace)
    }

    /// Switches events on.
    ///
    /// - Parameter strictly: a pattern that no event matches is an error under Merino's own name, and not
    ///   warned of: under the others, scripts for other versions have names that are not here.
    /// - Returns: whether only the list of events was asked for.
    static func apply(_ texts: [String], strictly: Bool = false) throws(BlockError) -> Bool {
        let warns = !strictly || Merino.program != "merino"
        for text in texts {
            if Tracing.isHelp(text) {
                StandardOutput.print(Tracing.help)
                return true
            }
            do throws(BlockError) {
                try Tracing.apply(text)
            } catch  where warns && error.code == .notFound && !text.contains("events=") {
                StandardError.print("\(Merino.program): warning: \(error.plainDescription)")
            }
        }
        return false
    }
}
