#if os(Linux)
import BlockCore
import CLinux
import Glibc

/// Signals to the process, taken one by one on an ``IOThread``. Confined to it.
///
/// Signals must be blocked in every thread before: ``block(_:)`` first thing in `main`.
public final class SignalSource: @unchecked Sendable {
    private let thread: IOThread
    private let descriptor: Int32
    private var isCancelled = false

    /// Blocks signals in the calling thread, and in those it starts.
    public static func block(_ signals: [Int32]) {
        var set = sigset_t()
        sigemptyset(&set)
        for signal in signals { sigaddset(&set, signal) }
        pthread_sigmask(SIG_BLOCK, &set, nil)
    }

    public init(_ signals: [Int32], on thread: IOThread) throws(BlockError) {
        self.thread = thread
        descriptor = linux_signal_descriptor(signals, Int32(signals.count))
        guard descriptor >= 0 else { throw .system("cannot watch for signals", errno) }
    }

    deinit {
        Glibc.close(descriptor)
    }

    /// The next signal; `nil` once ``cancel()`` was called.
    public func next() async -> Int32? {
        while !isCancelled {
            let result = await thread.perform(.awaitReadable(IOHandle(descriptor)))
            if result == -Int(ECANCELED) { return nil }
            var information = SignalInformation()
            let count = withUnsafeMutableBytes(of: &information) {
                read(descriptor, $0.baseAddress, $0.count)
            }
            if count == MemoryLayout<SignalInformation>.size {
                return Int32(bitPattern: information.number)
            }
        }
        return nil
    }

    /// Ends the wait for the next signal, and those to come.
    public func cancel() {
        isCancelled = true
        thread.engine.cancelAll(on: IOHandle(descriptor))
    }
}

/// `struct signalfd_siginfo` of linux/signalfd.h: 128 bytes that begin with the signal's number.
private struct SignalInformation {
    var number: UInt32 = 0
    var rest1: (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0, 0, 0, 0)
    var rest2: (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0, 0, 0, 0)
    var rest3: UInt64 = 0
}
#endif
