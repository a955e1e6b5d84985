import ArgumentParser
import BlockCore
import BlockIO
import ImageTools

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// How long commands show how far they are.
struct ProgressArguments: ParsableArguments {
    @Flag(name: [.customShort("p"), .long], help: "Show progress.") var progress = false
    @Flag(name: [.customShort("q"), .long], help: "Say nothing but errors.") var quiet = false
    @Option(
        name: .customLong("progress-fd"),
        help: "Write progress to this descriptor, a JSON object a line.")
    var progressDescriptor: Int32?

    /// The progress of a command's work, and its answers to signals. On the session's thread.
    ///
    /// - Parameter tidy: takes away what a half-done command must not leave.
    func begin(
        in session: ToolSession, tidy: @escaping @Sendable () -> Void = {}
    ) throws(BlockError) -> Progress {
        let progress = try make()
        try CommandSignals.watch(in: session, progress, tidy: tidy)
        return progress
    }

    private func make() throws(BlockError) -> Progress {
        var machine: (@Sendable (String) -> Void)?
        if let descriptor = progressDescriptor {
            guard fcntl(descriptor, F_GETFD) >= 0 else {
                throw BlockError(
                    .invalidArgument, "--progress-fd \(descriptor) is no open descriptor")
            }
            machine = { text in
                _ = text.withCString { write(descriptor, $0, strlen($0)) }
            }
        }
        guard progress, !quiet else {
            return Progress(.silent, clock: { CommandClock.now }, machine: machine)
        }
        // The known form for scripts; people who call Merino by its own name see a bar.
        let style: Progress.Style = Merino.program == "merino" && isatty(1) == 1 ? .bar : .percent
        return Progress(style, clock: { CommandClock.now }, machine: machine) { text in
            StandardOutput.print(text)
        }
    }
}

/// The clock of what commands show: rates, and the time that is left.
enum CommandClock {
    /// Nanoseconds of a clock that only goes forward.
    static var now: UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

/// Signals while a command works: SIGUSR1 asks how far it is; the others end it, tidily.
enum CommandSignals {
    private static let ending: [Int32] = [SIGINT, SIGTERM, SIGHUP]

    /// First thing in a command, before threads are started.
    static func prepare() {
        #if os(Linux)
        SignalSource.block([SIGUSR1] + ending)
        // Reports go on when nobody reads progress any more.
        signal(SIGPIPE, SIG_IGN)
        #endif
    }

    /// Answers signals from now on. On the session's thread.
    ///
    /// - Parameter tidy: takes away what a half-done command must not leave.
    static func watch(
        in session: ToolSession, _ progress: Progress, tidy: @escaping @Sendable () -> Void
    ) throws(BlockError) {
        #if os(Linux)
        let source = try SignalSource([SIGUSR1] + ending, on: session.thread)
        session.thread.spawn {
            while let number = await source.next() {
                if number == SIGUSR1 {
                    StandardError.print(String(progress.line.dropLast()))
                    continue
                }
                tidy()
                progress.end()
                // As a shell reports who was ended by a signal.
                end(128 + number)
            }
        }
        #endif
    }
}
