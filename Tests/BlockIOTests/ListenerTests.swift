import BlockCore
import BlockIO
import BlockTesting
import Testing

/// Listening where somebody else does, or did.
@Suite struct ListenerTests {
    /// - Parameter isReleased: whoever has the address gives it back while it is waited for.
    /// - Returns: where the second listener listens, or why it does not.
    private func listenTwice(
        on address: SocketAddress, isReleased: Bool
    ) async throws -> (first: SocketAddress, second: Result<SocketAddress, BlockError>) {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) in
            let first = try Listener(on: address, thread: thread)
            if isReleased {
                thread.spawn {
                    await thread.sleep(nanoseconds: 30_000_000)
                    first.close()
                }
            }
            defer { first.close() }
            do throws(BlockError) {
                let second = try await Listener.listening(on: first.address, thread: thread)
                defer { second.close() }
                return (first.address, .success(second.address))
            } catch {
                return (first.address, .failure(error))
            }
        }
    }

    @Test func anAddressThatIsAboutToBeFreeIsWaitedFor() async throws {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        for address in [
            SocketAddress.ipv4(address: 0x7f00_0001, port: 0), .unix(path: folder["s"]),
        ] {
            let (first, second) = try await listenTwice(on: address, isReleased: true)
            #expect(try second.get() == first)
        }
    }

    @Test func anAddressThatStaysInUseIsRefused() async throws {
        let address = SocketAddress.ipv4(address: 0x7f00_0001, port: 0)
        let (_, second) = try await listenTwice(on: address, isReleased: false)
        guard case .failure(let error) = second else {
            Issue.record("two listen on one address")
            return
        }
        #expect(error.code == .busy)
    }
}
