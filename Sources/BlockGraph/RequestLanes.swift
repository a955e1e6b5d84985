import BlockCore
import BlockIO

/// Pieces of one request that run side by side, a bounded number at once. Confined to its thread.
///
/// The request plans its pieces one after the other and starts each; it ends when all have ended, with
/// the first failure.
public final class RequestLanes: @unchecked Sendable {
    /// Pieces of one request that are in flight at once.
    public static let countMax = 16

    private let seat: IOSeat
    private var running = 0
    public private(set) var failure: BlockError?
    /// The request itself: nobody else waits.
    private var sleeper: UnsafeContinuation<Void, Never>?

    public init(on seat: IOSeat) {
        self.seat = seat
    }

    /// Waits until another piece may start. What a piece is about is looked up after that.
    public func waitForRoom() async {
        await wait(until: Self.countMax - 1)
    }

    /// Starts a piece; it runs up to its first wait before this returns. The last one is carried out:
    /// nobody has to run beside it.
    public func start(
        isLast: Bool = false, _ piece: @escaping @Sendable () async throws(BlockError) -> Void
    ) async {
        if isLast {
            do throws(BlockError) {
                try await piece()
            } catch {
                failure = failure ?? error
            }
            return
        }
        running += 1
        seat.spawn {
            do throws(BlockError) {
                try await piece()
            } catch {
                self.failure = self.failure ?? error
            }
            self.running -= 1
            if let sleeper = self.sleeper {
                self.sleeper = nil
                sleeper.resume()
            }
        }
    }

    /// Waits for all pieces.
    ///
    /// - Throws: the first failure.
    public func finish() async throws(BlockError) {
        await wait(until: 0)
        if let failure { throw failure }
    }

    private func wait(until count: Int) async {
        while running > count {
            await withUnsafeContinuation { sleeper = $0 }
        }
    }
}
