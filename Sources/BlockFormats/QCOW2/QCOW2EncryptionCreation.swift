import BlockCore
import BlockCrypto
import BlockGraph
import QMP

/// The encryption that a new image gets: the options under `encrypt`.
struct QCOW2EncryptionCreation: Sendable {
    private enum Format: String, CaseIterable { case luks, aes }

    let luks: LUKSCreationOptions
    let passphrase: SecretBytes

    /// Bytes of the LUKS header with its key slots.
    var headerBytes: Int { LUKS.payloadOffset(luks.cipher) }

    /// `nil` when none is asked for.
    init?(_ options: OptionReader, _ graph: BlockGraph) throws(BlockError) {
        guard let group = try Self.group(options) else { return nil }
        luks = try EncryptionOptions.creation(group)
        guard let passphrase = try EncryptionOptions.passphrase(group, graph) else {
            throw Self.missingKey
        }
        self.passphrase = passphrase
        try group.finish()
    }

    /// ``headerBytes`` of an image that these options would make; 0 for one that is not encrypted. Whose
    /// passphrase it is does not matter.
    static func headerBytes(_ options: OptionReader) throws(BlockError) -> Int {
        guard let group = try group(options) else { return 0 }
        let luks = try EncryptionOptions.creation(group)
        guard try group.string("key-secret") != nil else { throw missingKey }
        try group.finish()
        return LUKS.payloadOffset(luks.cipher)
    }

    private static var missingKey: BlockError {
        BlockError(
            .invalidArgument, "option 'encrypt.key-secret' is missing",
            remedy: "name a secret object that holds the passphrase")
    }

    /// The options of encryption, of a method that images are made with.
    private static func group(_ options: OptionReader) throws(BlockError) -> OptionReader? {
        let isLegacy = try options.bool("encryption") == true
        let group = try options.object("encrypt")
        guard group != nil || isLegacy else { return nil }
        guard let group, !isLegacy, let format = try group.enumeration("format", as: Format.self)
        else {
            throw BlockError(
                .invalidArgument, "'encrypt.format' is missing", remedy: "use encrypt.format=luks")
        }
        guard format == .luks else {
            throw BlockError(
                .unsupported, "no images are made with the old AES method, which is broken",
                remedy: "use encrypt.format=luks")
        }
        return group
    }

    func write(to target: Edge, at offset: Int) async throws(BlockError) {
        _ = try await LUKSArea.create(luks, passphrase, target, at: offset, isDetached: false)
    }
}
