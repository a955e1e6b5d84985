import BlockCore
import CLibcrypto

/// A key from a password (PBKDF2 with HMAC, RFC 8018 §5.2), a slice at a time: how long it takes is up to
/// whoever made the image, and nobody should have to wait for it.
///
/// CPU-heavy by design: ``advance(_:)`` is for worker threads, one at a time.
public final class KeyDerivation: @unchecked Sendable {
    private let hash: HashAlgorithm
    private let count: Int
    private let password: SecretBytes
    private let salt: [UInt8]
    private let iterations: Int
    /// The parts of the key, each as long as a digest; the last one is under way.
    private var blocks: [Block] = []
    /// Rounds of the last block that are still to do.
    private var left = 0

    private final class Block {
        let state: OpaquePointer

        init(_ state: OpaquePointer) { self.state = state }
        deinit { merino_pbkdf2_free(state) }
    }

    /// - Parameters:
    ///   - count: bytes of the key.
    ///   - iterations: 1 to `Int32.max`.
    public init(
        _ hash: HashAlgorithm, _ count: Int, from password: SecretBytes, salt: [UInt8],
        iterations: Int
    ) throws(BlockError) {
        guard iterations > 0, iterations <= Int(Int32.max), count > 0 else {
            throw BlockError(.invalidArgument, "\(iterations) PBKDF2 iterations are out of bounds")
        }
        try CryptoLibrary.load()
        self.hash = hash
        self.count = count
        self.password = password
        self.salt = salt
        self.iterations = iterations
    }

    /// Rounds of HMAC for a key of `count` bytes.
    public static func rounds(_ hash: HashAlgorithm, _ count: Int, iterations: Int) -> Int {
        (count + hash.digestSize - 1) / hash.digestSize * iterations
    }

    private var blockCount: Int { (count + hash.digestSize - 1) / hash.digestSize }

    public var isFinished: Bool { blocks.count == blockCount && left == 0 }

    /// Does `rounds` rounds, or those that are left of a block.
    public func advance(_ rounds: Int) throws(BlockError) {
        if isFinished { return }
        if left == 0 { try begin() }
        let count = min(rounds, left)
        guard let block = blocks.last, merino_pbkdf2_run(block.state, UInt32(count)) == 0 else {
            throw failure
        }
        left -= count
    }

    private func begin() throws(BlockError) {
        let number = UInt32(truncatingIfNeeded: blocks.count + 1)
        let state = password.withBytes { secret in
            merino_pbkdf2_new(
                hash.libraryName, secret.baseAddress?.assumingMemoryBound(to: UInt8.self),
                secret.count, salt, salt.count, number)
        }
        guard let state else { throw failure }
        blocks.append(Block(state))
        left = iterations - 1
    }

    private var failure: BlockError {
        BlockError(.unsupported, "PBKDF2 with '\(hash.rawValue)' failed")
    }

    /// The key, once ``isFinished``.
    public var key: SecretBytes {
        get throws(BlockError) {
            guard isFinished else { throw failure }
            return SecretBytes(count: count) { output in
                for (index, block) in blocks.enumerated() {
                    let start = index * hash.digestSize
                    let part = UnsafeMutableRawBufferPointer(
                        rebasing: output[start..<min(start + hash.digestSize, count)])
                    merino_pbkdf2_key(
                        block.state, part.baseAddress?.assumingMemoryBound(to: UInt8.self),
                        part.count)
                }
            }
        }
    }
}
