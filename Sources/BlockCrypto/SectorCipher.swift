import BlockCore
import CLibcrypto
import Synchronization

/// Encrypts and decrypts sectors of 512 bytes with one key. May be used from any thread, from several
/// at once.
///
/// Each sector is a unit of its own: its number gives the initialisation vector.
public final class SectorCipher: Sendable {
    public static let sectorSize = 512
    private static let blockSize = 16

    /// The library's state for one thread at a time. Nobody else uses it meanwhile.
    private final class Engine: @unchecked Sendable {
        let cipher: OpaquePointer
        /// Encrypts sector numbers, for ESSIV.
        let sectorNumbers: OpaquePointer?

        init(_ cipher: OpaquePointer, sectorNumbers: OpaquePointer?) {
            self.cipher = cipher
            self.sectorNumbers = sectorNumbers
        }

        deinit {
            merino_cipher_free(cipher)
            if let sectorNumbers { merino_cipher_free(sectorNumbers) }
        }
    }

    public let specification: CipherSpecification
    private let key: SecretBytes
    private let sectorKey: SecretBytes?
    private let idleEncrypting = Mutex<[Engine]>([])
    private let idleDecrypting = Mutex<[Engine]>([])

    /// - Throws: `invalidArgument` for a key of the wrong length, `unsupported` without the library.
    public init(_ specification: CipherSpecification, key: SecretBytes) throws(BlockError) {
        try CryptoLibrary.load()
        guard key.count == specification.keySize else {
            throw BlockError(
                .invalidArgument,
                "a key of \(key.count) bytes is not the \(specification.keySize) that "
                    + "\(specification.libraryName) takes")
        }
        self.specification = specification
        self.key = key
        if case .essiv(let hash) = specification.generator {
            let digest = key.withBytes { bytes -> Result<[UInt8], BlockError> in
                do throws(BlockError) {
                    return .success(try hash.digest(bytes))
                } catch {
                    return .failure(error)
                }
            }
            sectorKey = SecretBytes(try digest.get())
        } else {
            sectorKey = nil
        }
        // A key that the library refuses is refused here, not at the first request.
        let engine = try makeEngine(encrypts: true)
        idleEncrypting.withLock { $0.append(engine) }
    }

    /// Encrypts whole sectors, the first of which has number `sector`; `input` may be `output`.
    public func encrypt(
        _ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer, sector: UInt64
    ) throws(BlockError) {
        try run(input, output, sector, encrypts: true)
    }

    /// Decrypts whole sectors in place, the first of which has number `sector`.
    public func decrypt(
        _ bytes: UnsafeMutableRawBufferPointer, sector: UInt64
    ) throws(BlockError) {
        try run(UnsafeRawBufferPointer(bytes), bytes, sector, encrypts: false)
    }

    private func run(
        _ input: UnsafeRawBufferPointer, _ output: UnsafeMutableRawBufferPointer, _ sector: UInt64,
        encrypts: Bool
    ) throws(BlockError) {
        precondition(input.count == output.count && input.count % Self.sectorSize == 0)
        guard let source = input.baseAddress?.assumingMemoryBound(to: UInt8.self),
            let target = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        else { return }
        let engine = try takeEngine(encrypts: encrypts)
        defer { putBack(engine, encrypts: encrypts) }
        var offset = 0
        var number = sector
        while offset < input.count {
            var iv = initializationVector(number, engine)
            let result = withUnsafeBytes(of: &iv) { bytes in
                merino_cipher_run(
                    engine.cipher, bytes.baseAddress?.assumingMemoryBound(to: UInt8.self),
                    source + offset, target + offset, Self.sectorSize)
            }
            guard result == 0 else {
                throw BlockError(.inputOutput, "the crypto library failed at sector \(number)")
            }
            offset += Self.sectorSize
            number &+= 1
        }
    }

    private func initializationVector(_ sector: UInt64, _ engine: Engine) -> (UInt64, UInt64) {
        switch specification.generator {
        case .plain: return ((sector & 0xffff_ffff).littleEndian, 0)
        case .plain64: return (sector.littleEndian, 0)
        case .essiv:
            var block = (sector.littleEndian, UInt64(0))
            guard let cipher = engine.sectorNumbers else { return block }
            withUnsafeMutableBytes(of: &block) { bytes in
                let memory = bytes.baseAddress?.assumingMemoryBound(to: UInt8.self)
                _ = merino_cipher_run(cipher, nil, memory, memory, Self.blockSize)
            }
            return block
        }
    }

    private func takeEngine(encrypts: Bool) throws(BlockError) -> Engine {
        let idle =
            encrypts
            ? idleEncrypting.withLock { $0.popLast() } : idleDecrypting.withLock { $0.popLast() }
        if let idle { return idle }
        return try makeEngine(encrypts: encrypts)
    }

    private func putBack(_ engine: Engine, encrypts: Bool) {
        if encrypts {
            idleEncrypting.withLock { $0.append(engine) }
        } else {
            idleDecrypting.withLock { $0.append(engine) }
        }
    }

    private func makeEngine(encrypts: Bool) throws(BlockError) -> Engine {
        guard
            let cipher = Self.open(specification.libraryName, key, encrypts: encrypts)
        else {
            throw BlockError(
                .unsupported,
                "the crypto library refuses the key, or has no "
                    + specification.libraryName)
        }
        guard let sectorKey, case .essiv(let hash) = specification.generator,
            let name = CipherSpecification.essivCipher(hash)
        else { return Engine(cipher, sectorNumbers: nil) }
        guard let numbers = Self.open(name, sectorKey, encrypts: true) else {
            merino_cipher_free(cipher)
            throw BlockError(.unsupported, "the crypto library has no \(name)")
        }
        return Engine(cipher, sectorNumbers: numbers)
    }

    private static func open(
        _ name: String, _ key: SecretBytes, encrypts: Bool
    ) -> OpaquePointer? {
        key.withBytes { bytes in
            merino_cipher_new(
                name, bytes.baseAddress?.assumingMemoryBound(to: UInt8.self), bytes.count,
                encrypts ? 1 : 0)
        }
    }
}
