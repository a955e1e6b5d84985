import BlockCore
import BlockCrypto
import BlockGraph
import BlockIO
import QMP

/// `luks`: an encrypted disk, LUKS version 1.
///
/// ```
/// file     header │ key slots │ payload: sectors, numbered from 0
/// header   (optional) a file that holds header and slots; `file` is payload alone then
/// ```
/// A file that ends within a sector has that sector: what the file lacks of it counts as zeroes, and the first
/// write to it makes the file as long.
///
/// Without a key the image can be looked at, and that is all: whoever wants its data is refused when the
/// use begins.
final class LUKSDriver: BlockDriver, @unchecked Sendable {
    static let transferBytesMax = 4 << 20

    let node: BlockNode
    let file: Edge
    let area: LUKSArea
    /// In the file, in bytes.
    let payloadOffset: Int
    private let cipher: ImageCipher?
    private let masterKey: SecretBytes?

    static let driver = DriverDescription(
        name: "luks", kind: .format,
        open: { opening throws(BlockError) in try await LUKSDriver.open(opening) },
        create: { creation throws(BlockError) in try await LUKSCreation.create(creation) },
        probe: { LUKSHeader.matches($0) ? 100 : 0 },
        measure: { options throws(BlockError) in try LUKSMeasure.measure(options) })

    private static func open(_ opening: NodeOpening) async throws(BlockError) -> LUKSDriver {
        let file = try await opening.requiredChild("file", roles: [.data, .metadata, .primary])
        let apart = try await opening.child("header", roles: .metadata)
        let place = apart ?? file
        let area = try await LUKSArea.open(
            place, ByteRange(0, place.size), isDetached: apart != nil)
        var key: SecretBytes?
        if let passphrase = try EncryptionOptions.passphrase(opening.options, opening.graph) {
            key = try await area.masterKey(passphrase)
        }
        return try LUKSDriver(opening.node, file, area, key)
    }

    private init(
        _ node: BlockNode, _ file: Edge, _ area: LUKSArea, _ key: SecretBytes?
    ) throws(BlockError) {
        self.node = node
        self.file = file
        self.area = area
        masterKey = key
        payloadOffset = area.header.payloadOffset
        guard payloadOffset <= file.size else {
            throw BlockError(
                .corrupt,
                "the payload at \(payloadOffset) lies past the end of the file at "
                    + "\(file.size)", remedy: "the file was cut short: restore it")
        }
        cipher = try key.map { key throws(BlockError) in
            ImageCipher(try SectorCipher(area.header.cipher, key: key), on: node.seat)
        }
        node.size = Self.diskSize(file.size - payloadOffset)
        node.limits = file.node.limits
        node.limits.requestAlignment = max(
            file.node.limits.requestAlignment, ImageCipher.sectorSize)
        node.limits.transferMax = min(file.node.limits.transferMax, Self.transferBytesMax)
    }

    /// Of a payload of `bytes`: whole sectors.
    private static func diskSize(_ bytes: Int) -> Int {
        max(0, bytes).roundedUp(to: ImageCipher.sectorSize) ?? 0
    }

    var filename: String { file.node.driver.filename }

    func checkAccess(_ access: Access) throws(BlockError) {
        if cipher == nil, access.uses.contains(.consistentRead) {
            throw EncryptionOptions.lockedError("key-secret")
        }
    }

    private func unlocked() throws(BlockError) -> ImageCipher {
        guard let cipher else { throw EncryptionOptions.lockedError("key-secret") }
        return cipher
    }

    // MARK: Requests

    func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        let cipher = try unlocked()
        let start = payloadOffset + offset
        let there = min(vector.count, max(0, file.size - start))
        if there == vector.count {
            try await file.read(start, into: vector, flags)
        } else {
            vector.zero(there, vector.count - there)
            if there > 0 { try await file.read(start, into: vector.slice(0, there), flags) }
        }
        try await cipher.decrypt(vector, at: offset)
    }

    func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        let data = try await unlocked().encrypted(vector, at: offset)
        let end = payloadOffset + offset + vector.count
        if end > file.size { try await file.resize(to: end) }
        try await file.write(payloadOffset + offset, from: data, flags)
    }

    var supportsFUA: Bool { true }

    func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        throw BlockError(.unsupported, "encrypted zeroes are data")
    }

    func discard(_ range: ByteRange) async throws(BlockError) {
        // What was never written would read as noise, and noise shows where the data is.
        throw BlockError(.unsupported, "discards are not passed through encryption")
    }

    func flush() async throws(BlockError) {
        try await file.flush()
    }

    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        answer.append(BlockStatus([.data, .allocated], count: range.count))
    }

    func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        guard let rounded = size.roundedUp(to: ImageCipher.sectorSize),
            let end = rounded.adding(payloadOffset), end <= Limits.nodeSizeMax
        else {
            throw BlockError(.invalidArgument, "a size of \(size) bytes is out of bounds")
        }
        let old = node.size
        try await file.resize(to: end, preallocation)
        node.size = rounded
        guard rounded > old, let cipher else { return }
        do throws(BlockError) {
            try await zero(ByteRange(from: old, to: rounded), cipher)
        } catch {
            node.size = old
            throw error
        }
    }

    /// What the file has there would be read as noise.
    private func zero(_ range: ByteRange, _ cipher: ImageCipher) async throws(BlockError) {
        let zeroes = try IOVector(allocating: min(range.count, 1 << 20))
        zeroes.fill(0)
        var offset = range.offset
        while offset < range.end {
            let part = zeroes.slice(0, min(zeroes.count, range.end - offset))
            let data = try await cipher.encrypted(part, at: offset)
            try await file.write(payloadOffset + offset, from: data)
            offset += part.count
        }
    }

    func childResized(_ edge: Edge) {
        guard edge === file else { return }
        node.size = Self.diskSize(file.size - payloadOffset)
    }

    func amend(_ amendment: ImageAmendment) async throws(BlockError) {
        let change = try LUKSKeyChange(amendment.options, node.graph)
        try amendment.options.finish()
        try await change.apply(to: area, masterKey: masterKey, isForced: amendment.isForced)
    }

    var information: NodeInformation {
        get async throws(BlockError) {
            var result = NodeInformation()
            result.isEncrypted = true
            result.formatSpecific = ["type": "luks", "data": .object(area.information())]
            return result
        }
    }
}
