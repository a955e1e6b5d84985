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
        luks = try EncryptionOptions.creation(group)
        guard let passphrase = try EncryptionOptions.passphrase(group, graph) else {
            throw BlockError(
                .invalidArgument, "option 'encrypt.key-secret' is missing",
                remedy: "name a secret object that holds the passphrase")
        }
        self.passphrase = passphrase
        try group.finish()
    }

    func write(to target: Edge, at offset: Int) async throws(BlockError) {
        _ = try await LUKSArea.create(luks, passphrase, target, at: offset, isDetached: false)
    }
}
