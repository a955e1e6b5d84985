import BlockCore

/// A block cipher with its key length, by the names of options.
public enum CipherAlgorithm: String, Sendable, CaseIterable {
    case aes128 = "aes-128"
    case aes192 = "aes-192"
    case aes256 = "aes-256"

    /// Bytes; XTS takes two such keys.
    public var keySize: Int {
        switch self {
        case .aes128: 16
        case .aes192: 24
        case .aes256: 32
        }
    }
}

/// How a cipher runs over the blocks of a sector.
public enum CipherMode: String, Sendable, CaseIterable {
    case ecb, cbc, xts
}

/// Where the initialisation vector of a sector comes from.
public enum IVGenerator: Sendable, Equatable {
    /// The sector number's low 32 bits, little-endian.
    case plain
    /// The sector number in 64 bits, little-endian.
    case plain64
    /// The sector number encrypted with the hash of the key.
    case essiv(HashAlgorithm)

    /// The name without the hash, as options have it.
    public var name: String {
        switch self {
        case .plain: "plain"
        case .plain64: "plain64"
        case .essiv: "essiv"
        }
    }

    public var hash: HashAlgorithm? {
        if case .essiv(let hash) = self { return hash }
        return nil
    }
}

/// All that says how sectors are encrypted, but for the key.
public struct CipherSpecification: Sendable, Equatable {
    public var algorithm: CipherAlgorithm
    public var mode: CipherMode
    public var generator: IVGenerator

    /// - Throws: `unsupported` for combinations that do not exist.
    public init(
        _ algorithm: CipherAlgorithm, _ mode: CipherMode, _ generator: IVGenerator
    ) throws(BlockError) {
        if mode == .xts, algorithm == .aes192 {
            throw BlockError(
                .unsupported, "there is no XTS with keys of 192 bits",
                remedy: "use aes-256 or aes-128")
        }
        if case .essiv(let hash) = generator, Self.essivCipher(hash) == nil {
            throw BlockError(
                .unsupported, "ESSIV with '\(hash.rawValue)' gives no key that AES takes",
                remedy: "use sha256")
        }
        self.algorithm = algorithm
        self.mode = mode
        self.generator = generator
    }

    /// Bytes of the whole key.
    public var keySize: Int { mode == .xts ? 2 * algorithm.keySize : algorithm.keySize }

    /// As libcrypto calls it: `AES-256-XTS`.
    var libraryName: String {
        "AES-\(algorithm.keySize * 8)-\(mode.rawValue.uppercased())"
    }

    /// The cipher that encrypts sector numbers: AES with a key as long as the hash.
    static func essivCipher(_ hash: HashAlgorithm) -> String? {
        switch hash.digestSize {
        case 16: "AES-128-ECB"
        case 24: "AES-192-ECB"
        case 32: "AES-256-ECB"
        default: nil
        }
    }
}
