import BlockCore
import BlockIO
import QMP
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Standard input and output of the process, for a monitor on a terminal or at the end of a pipe.
final class StandardStreams: CharacterDevice, MonitorChannel, @unchecked Sendable {
    private static let isTaken = Atomic(false)

    let typeName = "chardev-stdio"
    let filename = "stdio"
    private(set) var isUsed = false
    private let thread: IOThread
    private let input: DescriptorInput
    private var terminal: termios?

    /// Option `signal`: whether Ctrl-C at a terminal interrupts the process.
    init(_ options: OptionReader, on thread: IOThread) throws(BlockError) {
        let signals = try options.bool("signal") ?? true
        try options.finish()
        guard !Self.isTaken.exchange(true, ordering: .relaxed) else {
            throw BlockError(.busy, "another character device has the standard streams already")
        }
        self.thread = thread
        input = DescriptorInput(STDIN_FILENO, "standard input", on: thread)
        if !signals { turnSignalsOff() }
    }

    private func turnSignalsOff() {
        var mode = termios()
        guard tcgetattr(STDIN_FILENO, &mode) == 0 else { return }
        terminal = mode
        mode.c_lflag &= ~tcflag_t(ISIG)
        tcsetattr(STDIN_FILENO, TCSANOW, &mode)
    }

    func attach(to monitors: MonitorServer, isPretty: Bool) throws(BlockError) {
        try checkUnused()
        isUsed = true
        monitors.serve(self, isPretty: isPretty)
    }

    /// Gives the terminal back as it was. The streams themselves stay open.
    func close() {
        shutdown()
        if var terminal { tcsetattr(STDIN_FILENO, TCSANOW, &terminal) }
        terminal = nil
        Self.isTaken.store(false, ordering: .relaxed)
    }

    // MARK: Channel

    func receive(_ vector: IOVector) async throws(BlockError) -> Int {
        try await input.receive(vector)
    }

    func send(_ vector: IOVector) async throws(BlockError) {
        let bytes = vector.array
        // A terminal can be held up for as long as somebody likes.
        let failure = await thread.offload { () -> Int32 in
            var rest = bytes[...]
            while !rest.isEmpty {
                let count = rest.withUnsafeBytes { write(STDOUT_FILENO, $0.baseAddress, $0.count) }
                if count < 0, errno == EINTR || errno == EAGAIN { continue }
                if count < 0 { return errno }
                rest = rest.dropFirst(count)
            }
            return 0
        }
        if failure != 0 { throw .system("cannot write to standard output", failure) }
    }

    func shutdown() { input.shutdown() }
}
