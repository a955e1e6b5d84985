import BlockCore
import BlockCrypto
import BlockGraph
import QMP

/// Reads the options of encryption, which the `luks` driver has at its top, and qcow2 under `encrypt`.
enum EncryptionOptions {
    /// What `key-secret` names; `nil` where it is not given.
    static func passphrase(
        _ options: OptionReader, _ graph: BlockGraph
    ) throws(BlockError) -> SecretBytes? {
        guard let name = try options.string("key-secret") else { return nil }
        return try passphrase(named: name, graph)
    }

    static func passphrase(
        named name: String, _ graph: BlockGraph
    ) throws(BlockError) -> SecretBytes {
        let bytes = try graph.secret(named: name)
        guard bytes.count <= LUKS.Limit.passphraseBytesMax else {
            throw BlockError(.exhausted, "the secret '\(name)' is too long for a passphrase")
        }
        return bytes
    }

    private enum GeneratorName: String, CaseIterable { case plain, plain64, essiv }

    /// `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time`.
    static func creation(_ options: OptionReader) throws(BlockError) -> LUKSCreationOptions {
        let algorithm =
            try options.enumeration("cipher-alg", as: CipherAlgorithm.self) ?? .aes256
        let mode = try options.enumeration("cipher-mode", as: CipherMode.self) ?? .xts
        let name = try options.enumeration("ivgen-alg", as: GeneratorName.self) ?? .plain64
        let vectorHash = try options.enumeration("ivgen-hash-alg", as: HashAlgorithm.self)
        let generator: IVGenerator
        switch name {
        case .plain: generator = .plain
        case .plain64: generator = .plain64
        case .essiv: generator = .essiv(vectorHash ?? .sha256)
        }
        if vectorHash != nil, name != .essiv {
            throw BlockError(.invalidArgument, "'ivgen-hash-alg' is for 'ivgen-alg' essiv alone")
        }
        guard mode != .ecb else {
            throw BlockError(
                .unsupported, "ECB shows where sectors are equal: no images are made with it",
                remedy: "use cipher-mode=xts")
        }
        let hash = try options.enumeration("hash-alg", as: HashAlgorithm.self) ?? .sha256
        let milliseconds =
            try options.int("iter-time") ?? LUKSCreationOptions.iterationMillisecondsDefault
        return LUKSCreationOptions(
            try CipherSpecification(algorithm, mode, generator), hash: hash,
            iterationMilliseconds: milliseconds)
    }

    /// The error of whoever wants data of an image that was opened without its key.
    static func lockedError(_ option: String) -> BlockError {
        BlockError(
            .permissionDenied, "the image is encrypted, and it was opened without a key",
            remedy: "name a secret object as '\(option)'")
    }
}
