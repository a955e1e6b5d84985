import BlockCore
import CLibcrypto

/// The library that the algorithms come from: OpenSSL's libcrypto, loaded when it is first needed.
public enum CryptoLibrary {
    /// Makes the library ready; every initialiser and function here that needs it calls this.
    ///
    /// - Throws: `unsupported`, with the package to install, where the library is not there.
    public static func load() throws(BlockError) {
        guard let failure = merino_crypto_load() else { return }
        throw BlockError(
            .unsupported, "encryption is not available: \(String(cString: failure))",
            remedy: "install OpenSSL's libcrypto 3 (Debian: libssl3)")
    }

    /// `count` bytes that nobody can guess.
    public static func randomBytes(_ count: Int) -> [UInt8] {
        var generator = SystemRandomNumberGenerator()
        return (0..<count).map { _ in UInt8.random(in: .min ... .max, using: &generator) }
    }
}

/// Bytes that are secret: overwritten when the last reference goes.
public final class SecretBytes: Sendable {
    /// Bytes.
    public let count: Int
    // Written before the initialiser returns and in `deinit` only.
    private nonisolated(unsafe) let memory: UnsafeMutableRawBufferPointer

    /// Memory of `count` bytes that `fill` fills in.
    public init(count: Int, _ fill: (UnsafeMutableRawBufferPointer) -> Void) {
        self.count = count
        memory = .allocate(byteCount: max(count, 1), alignment: 16)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
        fill(UnsafeMutableRawBufferPointer(rebasing: memory[0..<count]))
    }

    public convenience init(_ bytes: [UInt8]) {
        self.init(count: bytes.count) { $0.copyBytes(from: bytes) }
    }

    /// As many random bytes.
    public static func random(count: Int) -> SecretBytes {
        SecretBytes(CryptoLibrary.randomBytes(count))
    }

    deinit {
        // Without the library there was nothing to keep secret.
        if merino_crypto_load() == nil {
            merino_crypto_wipe(memory.baseAddress, memory.count)
        }
        memory.deallocate()
    }

    /// Valid during the call.
    public func withBytes<T>(_ body: (UnsafeRawBufferPointer) -> T) -> T {
        body(UnsafeRawBufferPointer(rebasing: memory[0..<count]))
    }

    /// Takes as long whether the bytes are equal or not.
    public func isEqual(to other: SecretBytes) -> Bool {
        guard count == other.count else { return false }
        return withBytes { mine in
            other.withBytes { theirs in
                var difference: UInt8 = 0
                for index in 0..<mine.count { difference |= mine[index] ^ theirs[index] }
                return difference == 0
            }
        }
    }
}
