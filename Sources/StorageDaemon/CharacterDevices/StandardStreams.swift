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
    private var terminal: termios?
    private var isShutDown = false

    /// Option `signal`: whether Ctrl-C at a terminal interrupts the process.
    init(_ options: OptionReader, on thread: IOThread) throws(BlockError) {
        let signals = try options.bool("signal") ?? true
        try options.finish()
        guard !Self.isTaken.exchange(true, ordering: .relaxed) else {
            throw BlockError(.busy, "another character device has the standard streams already")
        }
        self.thread = thread
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
        guard !isUsed else {
            throw BlockError(.busy, "another monitor uses the character device")
        }
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
        var bytes = [UInt8](repeating: 0, count: vector.count)
        while !isShutDown {
            let ready = await thread.perform(.awaitReadable(IOHandle(STDIN_FILENO)))
            if isShutDown || ready == -Int(ECANCELED) { return 0 }
            // It does not wait: there is something to read, or the end.
            let count = read(STDIN_FILENO, &bytes, bytes.count)
            if count < 0, errno == EINTR || errno == EAGAIN { continue }
            guard count >= 0 else { throw .system("cannot read standard input", errno) }
            bytes.withUnsafeBytes {
                vector.slice(0, count).copy(from: UnsafeRawBufferPointer(rebasing: $0[..<count]))
            }
            return count
        }
        return 0
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

    func shutdown() {
        guard !isShutDown else { return }
        isShutDown = true
        thread.engine.cancelAll(on: IOHandle(STDIN_FILENO))
    }
}
