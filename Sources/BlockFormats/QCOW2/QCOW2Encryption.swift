import BlockCore
import BlockCrypto
import BlockGraph
import BlockIO
import QMP

/// How the data clusters of an encrypted image are encrypted (§Data encryption). Tables, and
/// compressed clusters, are not.
///
/// | method | key | a sector's number comes from |
/// |---|---|---|
/// | `aes` | the passphrase itself, AES-128-CBC | its guest offset |
/// | `luks` | a LUKS header within the image | its offset in the file |
struct QCOW2Encryption: Sendable {
    enum Method: UInt32, Sendable { case aes = 1, luks = 2 }

    let method: Method
    /// The LUKS header, confined to the thread of the graph.
    nonisolated(unsafe) let area: LUKSArea?
    /// `nil` when the image was opened without a key.
    let cipher: ImageCipher?
    /// Of LUKS images: what further keys are made for.
    let masterKey: SecretBytes?

    /// The offset that gives the sectors of data at `host` in the file, `guest` in the disk, their
    /// numbers.
    func offset(host: Int, guest: Int) -> Int {
        method == .luks ? host : guest
    }

    var information: JSONValue {
        var data: JSONObject = area?.information(format: "luks") ?? JSONObject()
        if method == .aes { data["format"] = "aes" }
        return .object(data)
    }
}

extension QCOW2Encryption {
    private enum Format: String, CaseIterable { case aes, luks }

    /// What `encrypt` says of the image with `header`; `nil` for images that are not encrypted.
    static func open(
        _ header: QCOW2.Header, _ file: Edge, _ options: OptionReader, for node: BlockNode
    ) async throws(BlockError) -> QCOW2Encryption? {
        let options = try options.object("encrypt")
        guard header.encryptionMethod != 0 else {
            guard options == nil else {
                throw BlockError(
                    .invalidArgument, "'encrypt' is given, but the image is not encrypted")
            }
            return nil
        }
        guard let method = Method(rawValue: header.encryptionMethod) else {
            throw BlockError(
                .unsupported, "encryption method \(header.encryptionMethod) is not supported")
        }
        let given = try options?.enumeration("format", as: Format.self)
        guard given == nil || given == (method == .luks ? .luks : .aes) else {
            throw BlockError(
                .invalidArgument,
                "the image is encrypted as \(method), not as 'encrypt.format' says")
        }
        var passphrase: SecretBytes?
        if let options {
            passphrase = try EncryptionOptions.passphrase(options, node.graph)
            try options.finish()
        }
        switch method {
        case .aes:
            let cipher = try passphrase.map { secret throws(BlockError) in
                ImageCipher(try legacyCipher(secret), on: node.seat)
            }
            return QCOW2Encryption(method: method, area: nil, cipher: cipher, masterKey: nil)
        case .luks:
            guard let place = header.encryptionHeader else {
                throw BlockError(
                    .corrupt, "the image's encryption header is missing or out of bounds")
            }
            let area = try await LUKSArea.open(file, place, isDetached: false)
            guard let passphrase else {
                return QCOW2Encryption(method: method, area: area, cipher: nil, masterKey: nil)
            }
            let key = try await area.masterKey(passphrase)
            let cipher = ImageCipher(
                try SectorCipher(area.header.cipher, key: key), on: node.seat)
            return QCOW2Encryption(method: method, area: area, cipher: cipher, masterKey: key)
        }
    }

    /// The key is the passphrase's first 16 bytes, with zeroes behind a shorter one.
    private static func legacyCipher(_ passphrase: SecretBytes) throws(BlockError) -> SectorCipher {
        let key = SecretBytes(count: CipherAlgorithm.aes128.keySize) { out in
            passphrase.withBytes { bytes in
                out.copyBytes(from: bytes.prefix(out.count))
            }
        }
        return try SectorCipher(try CipherSpecification(.aes128, .cbc, .plain64), key: key)
    }
}

extension QCOW2.Header {
    /// Where the encryption header is, which LUKS images have (§Full disk encryption header pointer);
    /// in whole clusters, ``encryptionPlace``.
    func parseEncryptionHeader() -> ByteRange? {
        guard encryptionMethod == QCOW2Encryption.Method.luks.rawValue,
            let data = extensions.first(where: { $0.type == QCOW2.HeaderExtension.encryptionHeader }
            )?
            .data, data.count >= 16
        else { return nil }
        return data.withUnsafeBytes { bytes in
            let offset: UInt64 = bytes.bigEndian(at: 0)
            let length: UInt64 = bytes.bigEndian(at: 8)
            guard offset < UInt64(QCOW2.Limit.hostOffsetMax),
                Int(offset).isAligned(to: 1 << clusterBits),
                length <= UInt64(QCOW2.Limit.encryptionHeaderBytesMax), offset > 0
            else { return nil }
            return ByteRange(checking: offset, count: length)
        }
    }

    /// Says where the encryption header is.
    mutating func setEncryptionHeader(_ range: ByteRange) {
        encryptionMethod = QCOW2Encryption.Method.luks.rawValue
        var data = [UInt8](repeating: 0, count: 16)
        data.withUnsafeMutableBytes { bytes in
            bytes.storeBigEndian(UInt64(range.offset), at: 0)
            bytes.storeBigEndian(UInt64(range.count), at: 8)
        }
        extensions.removeAll { $0.type == QCOW2.HeaderExtension.encryptionHeader }
        // First, where every reader looks before it gives up on an unknown one.
        extensions.insert(
            .init(type: QCOW2.HeaderExtension.encryptionHeader, data: data), at: 0)
        encryptionHeader = range
    }
}

// MARK: Data

extension QCOW2Driver {
    /// Whether data must be transformed on its way.
    @inline(__always) var isEncrypted: Bool { encryption != nil }

    private func unlocked() throws(BlockError) -> (QCOW2Encryption, ImageCipher) {
        guard let encryption, let cipher = encryption.cipher else {
            throw EncryptionOptions.lockedError("encrypt.key-secret")
        }
        return (encryption, cipher)
    }

    /// Without a key the image can be looked at; whoever wants its data is refused.
    func checkKey(_ access: Access) throws(BlockError) {
        if let encryption, encryption.cipher == nil,
            !access.uses.isDisjoint(with: [.consistentRead])
        {
            throw EncryptionOptions.lockedError("encrypt.key-secret")
        }
    }

    /// Guest data from `host` in the file.
    func readEncrypted(_ host: Int, _ guest: Int, into vector: IOVector) async throws(BlockError) {
        let (encryption, cipher) = try unlocked()
        let (head, count) = Self.sectors(host, vector.count)
        // The disk may end within a sector; its cluster does not.
        let target = count == vector.count ? vector : try IOVector(allocating: count)
        try await readStored(host - head, into: target)
        try await cipher.decrypt(
            target, at: encryption.offset(host: host - head, guest: guest - head))
        if count != vector.count { vector.copy(from: target.slice(head, vector.count)) }
    }

    /// Whole sectors around `count` bytes at `offset`: what is before them in the first, and all.
    private static func sectors(_ offset: Int, _ count: Int) -> (head: Int, count: Int) {
        let mask = ImageCipher.sectorSize - 1
        let head = offset & mask
        return (head, (head + count + mask) & ~mask)
    }

    /// Guest data to `host` in the file.
    func writeEncrypted(
        _ host: Int, _ guest: Int, from vector: IOVector
    ) async throws(BlockError) {
        let (head, count) = Self.sectors(host, vector.count)
        if count != vector.count {
            // At the end of a disk that ends within a sector.
            let whole = try IOVector(allocating: count)
            try await readEncrypted(host - head, guest - head, into: whole)
            whole.slice(head, vector.count).copy(from: vector)
            try await writeSectors(host - head, guest - head, from: whole)
        } else {
            try await writeSectors(host, guest, from: vector)
        }
    }

    /// In pieces: what is encrypted has memory of its own.
    private func writeSectors(
        _ host: Int, _ guest: Int, from vector: IOVector
    ) async throws(BlockError) {
        let (encryption, cipher) = try unlocked()
        var done = 0
        while done < vector.count {
            let part = vector.slice(done, min(vector.count - done, Self.encryptedPieceBytesMax))
            let encrypted = try await cipher.encrypted(
                part, at: encryption.offset(host: host + done, guest: guest + done))
            try await data.write(host + done, from: encrypted)
            done += part.count
        }
    }

    static let encryptedPieceBytesMax = 4 << 20
}
