import BlockCore
import BlockIO

/// A connection's bytes: the socket's own, or what TLS makes of them. Confined to its thread.
protocol NBDChannel: AnyObject, Sendable {
    /// Receives at least one byte; 0 is a proper end.
    ///
    /// - Parameter isLikelyThere: see ``Socket/receive(_:isLikelyThere:)``.
    func receive(_ vector: IOVector, isLikelyThere: Bool) async throws(BlockError) -> Int
    /// Sends what can be sent without waiting; `nil` when nothing can. What is left of `vector` is what
    /// the caller must send next.
    func sendNow(_ vector: IOVector) -> Int?
    /// Sends all. One send at a time.
    func send(_ vector: IOVector) async throws(BlockError)
    /// Waits until the peer has taken most of what was sent, or so long.
    ///
    /// - Returns: whether there was anything to wait for.
    func untilTaken(nanosecondsMax: UInt64) async -> Bool
    /// Ends receiving: what was sent before can still be received, then comes the end.
    func shutdownReceiving()
    /// Ends both directions: pending calls return.
    func shutdown()
    func close()
}

extension Socket: NBDChannel {}
