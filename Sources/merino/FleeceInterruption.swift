import BlockCore
import BlockIO
import StorageDaemon

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// The signals that end `fleece`, watched for from its beginning on. Confined to its thread.
///
///     nothing set up yet:  a signal ends the process
///     from then on:        the first signal ends the view. A daemon that leaves a command unanswered after it is
///                          given up: in ten seconds, or in one when there was a second signal
final class FleeceInterruption: @unchecked Sendable {
    static let signals = [SIGINT, SIGTERM, SIGHUP]
    private static let patienceNanoseconds: UInt64 = 10_000_000_000
    /// People press Ctrl-C twice: a daemon that is at work is not given up for that.
    private static let impatienceNanoseconds: UInt64 = 1_000_000_000

    private let thread: IOThread
    private let source: SignalSource
    private var patience = patienceNanoseconds
    /// The first that came.
    private(set) var signal: Int32?
    /// Nothing was set up that would have to be taken down.
    var endsAtOnce = true
    /// The daemon that is given up when it does not answer.
    var client: QMPClient?

    /// The signals are blocked in all threads.
    init(on thread: IOThread) throws(BlockError) {
        self.thread = thread
        source = try SignalSource(Self.signals, on: thread)
        thread.spawn { [self] in await watch() }
    }

    private func watch() async {
        while let number = await source.next() {
            // As a shell reports who was ended by a signal.
            if endsAtOnce { end(128 + number) }
            if signal == nil {
                signal = number
                thread.spawn { [self] in await waitForAnswers() }
            } else {
                patience = Self.impatienceNanoseconds
            }
        }
    }

    private func waitForAnswers() async {
        let start = thread.now
        while true {
            await thread.sleep(nanoseconds: 100_000_000)
            guard let client, let since = client.waitingSince else { continue }
            if thread.now - max(start, since) >= patience { return client.giveUp() }
        }
    }

    /// - Throws: `cancelled` once a signal came.
    func check() throws(BlockError) {
        if let signal { throw BlockError(.cancelled, "interrupted by signal \(signal)") }
    }
}
