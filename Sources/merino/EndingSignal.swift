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

/// The signal that ends a server, watched for from the beginning on: while an image is being opened it ends
/// the work on its passphrase. Confined to the session's thread.
final class EndingSignal: @unchecked Sendable {
    static let signals = [SIGINT, SIGTERM, SIGHUP]

    private let source: SignalSource
    private var hasCome = false
    private var waiter: UnsafeContinuation<Void, Never>?

    /// The signals are blocked in all threads.
    init(in session: ToolSession) throws(BlockError) {
        source = try SignalSource(Self.signals, on: session.thread)
        session.thread.spawn { [self] in
            _ = await source.next()
            hasCome = true
            session.graph.endLongWork()
            waiter?.resume()
            waiter = nil
        }
    }

    /// As if it had come.
    func raise() { source.cancel() }

    /// Returns once it has come. One caller.
    func wait() async {
        if hasCome { return }
        await withUnsafeContinuation { waiter = $0 }
    }
}
