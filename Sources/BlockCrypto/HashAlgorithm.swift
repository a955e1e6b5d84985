import BlockCore
import CLibcrypto

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A digest, by the names of options and of LUKS headers.
public enum HashAlgorithm: String, Sendable, CaseIterable {
    case sha1, sha224, sha256, sha384, sha512

    /// Bytes of a digest.
    public var digestSize: Int {
        switch self {
        case .sha1: 20
        case .sha224: 28
        case .sha256: 32
        case .sha384: 48
        case .sha512: 64
        }
    }

    var libraryName: String { rawValue.uppercased() }

    /// The digest of `bytes`.
    public func digest(_ bytes: UnsafeRawBufferPointer) throws(BlockError) -> [UInt8] {
        try CryptoLibrary.load()
        var result = [UInt8](repeating: 0, count: digestSize)
        let input = bytes.baseAddress?.assumingMemoryBound(to: UInt8.self)
        guard merino_digest(libraryName, input, bytes.count, &result) == 0 else {
            throw BlockError(.unsupported, "the crypto library has no digest '\(rawValue)'")
        }
        return result
    }

    /// A key of `count` bytes from a password, in one go: see ``KeyDerivation``.
    ///
    /// CPU-heavy by design: for worker threads.
    public func derive(
        _ count: Int, from password: SecretBytes, salt: [UInt8], iterations: Int
    ) throws(BlockError) -> SecretBytes {
        let work = try KeyDerivation(
            self, count, from: password, salt: salt, iterations: iterations)
        while !work.isFinished { try work.advance(.max) }
        return try work.key
    }

    /// How many PBKDF2 iterations for a key of `count` bytes this processor does in a second.
    ///
    /// Takes some tenths of a second of processor time: for worker threads.
    public func iterationsPerSecond(keySize count: Int) throws(BlockError) -> Int {
        let password = SecretBytes([UInt8](repeating: 0x6d, count: 16))
        let salt = [UInt8](repeating: 0x73, count: 32)
        var iterations = 1 << 12
        while true {
            let start = Self.processorNanoseconds
            _ = try derive(count, from: password, salt: salt, iterations: iterations)
            let elapsed = max(Self.processorNanoseconds &- start, 1)
            if elapsed >= Self.measuredNanosecondsMin || iterations >= 1 << 28 {
                let rate = Double(iterations) * 1e9 / Double(elapsed)
                return Int(min(rate, Double(Int32.max)))
            }
            iterations <<= 1
        }
    }

    private static let measuredNanosecondsMin: UInt64 = 100_000_000

    /// Processor time of this thread: what others run does not count.
    private static var processorNanoseconds: UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
        return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
    }
}
