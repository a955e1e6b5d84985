import BlockCore
import BlockCrypto
import BlockGraph
import BlockIO
import QMP

/// A LUKS header and its key slots, where an image has them: at the front of a file, in a file of their
/// own, or within a qcow2 image. Confined to the graph's thread.
///
/// A new key's material is durable before the header that names it; a key is gone from the header, durably,
/// before its material is overwritten.
final class LUKSArea {
    private let edge: Edge
    /// Where the header begins, in bytes.
    private let offset: Int
    /// Bytes that it may take from there on, with its slots.
    private let count: Int
    private(set) var header: LUKSHeader
    /// Asked before anything is written: refuses what would overwrite something else.
    var checkWrite: (_ offset: Int, _ count: Int) async throws(BlockError) -> Void = { _, _ in }

    private var thread: IOThread { edge.node.thread }

    private init(_ edge: Edge, _ range: ByteRange, _ header: LUKSHeader) {
        self.edge = edge
        offset = range.offset
        count = range.count
        self.header = header
    }

    // MARK: Open and create

    /// Reads the header at `range.offset`; all of its slots must lie within `range`.
    static func open(
        _ edge: Edge, _ range: ByteRange, isDetached: Bool
    ) async throws(BlockError) -> LUKSArea {
        guard range.end <= edge.size, range.count >= LUKS.headerSize else {
            throw BlockError(.wrongFormat, "there is no room for a LUKS header")
        }
        let start = try IOVector(allocating: LUKS.headerSize)
        try await edge.read(range.offset, into: start)
        guard let bytes = start.single?.bytes else {
            throw BlockError(.exhausted, "no memory for a LUKS header")
        }
        let header = try LUKSHeader(
            parsing: UnsafeRawBufferPointer(bytes), isDetached: isDetached)
        let end =
            header.slots.indices.filter { header.slots[$0].isActive }
            .map { header.materialRange(of: $0).end }.max() ?? LUKS.headerSize
        guard end <= range.count else {
            throw BlockError(
                .corrupt,
                "LUKS key slots reach to \(end), past the end of their place at "
                    + "\(range.count)")
        }
        return LUKSArea(edge, range, header)
    }

    /// Makes a header that `passphrase` opens, and writes it. Durable after a flush.
    ///
    /// The node reaches past the payload offset, or past the slots of a detached header.
    static func create(
        _ options: LUKSCreationOptions, _ passphrase: SecretBytes, _ edge: Edge, at offset: Int,
        isDetached: Bool
    ) async throws(BlockError) -> LUKSArea {
        let made = try await edge.node.thread.offload { () throws(BlockError) in
            var (header, key) = try LUKSHeader.make(options, isDetached: isDetached)
            let material = try header.setSlot(
                0, passphrase, key, iterationMilliseconds: options.iterationMilliseconds)
            return (header: header, material: material)
        }
        let area = LUKSArea(edge, ByteRange(offset, made.header.end), made.header)
        try await area.write(made.material, ofSlot: 0)
        try await area.write(made.header)
        return area
    }

    // MARK: Keys

    /// The master key.
    ///
    /// - Throws: `permissionDenied` when `passphrase` opens no slot.
    func masterKey(_ passphrase: SecretBytes) async throws(BlockError) -> SecretBytes {
        for slot in header.slots.indices where header.slots[slot].isActive {
            if let key = try await masterKey(passphrase, inSlot: slot) { return key }
        }
        throw BlockError(
            .permissionDenied, "the passphrase opens none of the image's key slots",
            remedy: "check the secret that 'key-secret' names")
    }

    /// The master key, if `passphrase` opens `slot`.
    ///
    /// - Throws: `exhausted` where the header asks for too much work; `cancelled` when all work ends.
    func masterKey(
        _ passphrase: SecretBytes, inSlot slot: Int
    ) async throws(BlockError) -> SecretBytes? {
        try header.checkUnlockRounds()
        guard header.slots[slot].isActive else { return nil }
        let range = header.materialRange(of: slot)
        let material = try IOVector(allocating: range.count)
        try await edge.read(offset + range.offset, into: material)
        let header = header
        let slotKey = try await derive(try header.slotKey(slot, passphrase))
        let candidate = try await thread.offload { () throws(BlockError) in
            try header.candidate(inSlot: slot, slotKey, material: material.array)
        }
        let digest = try await derive(try header.digest(of: candidate))
        return header.isMasterDigest(digest) ? candidate : nil
    }

    /// Slice by slice: the worker threads are there for others too, and nobody waits for it at the end.
    private func derive(_ work: KeyDerivation) async throws(BlockError) -> SecretBytes {
        while !work.isFinished {
            guard !edge.node.graph.isEnding else {
                throw BlockError(.cancelled, "trying the passphrase was given up")
            }
            try await thread.offload { () throws(BlockError) in
                try work.advance(LUKS.Limit.roundsAtOnce)
            }
        }
        return try work.key
    }

    /// Makes `passphrase` open `slot`.
    func setKey(
        _ slot: Int, _ passphrase: SecretBytes, _ masterKey: SecretBytes,
        iterationMilliseconds: Int
    ) async throws(BlockError) {
        let old = header
        let made = try await thread.offload { () throws(BlockError) in
            var header = old
            let material = try header.setSlot(
                slot, passphrase, masterKey, iterationMilliseconds: iterationMilliseconds)
            return (header: header, material: material)
        }
        try await write(made.material, ofSlot: slot)
        try await edge.flush()
        try await write(made.header)
        try await edge.flush()
        header = made.header
    }

    /// Destroys the key in `slot`.
    func eraseKey(_ slot: Int) async throws(BlockError) {
        var rest = header
        rest.eraseSlot(slot)
        try await write(rest)
        try await edge.flush()
        header = rest
        // What is left of the header's older state on storage opens nothing then.
        let count = header.materialRange(of: slot).count
        try await write(CryptoLibrary.randomBytes(count), ofSlot: slot)
        try await edge.flush()
    }

    private func write(_ material: [UInt8], ofSlot slot: Int) async throws(BlockError) {
        try await write(material, at: header.materialRange(of: slot).offset)
    }

    private func write(_ header: LUKSHeader) async throws(BlockError) {
        try await write(header.serialised(), at: 0)
    }

    private func write(_ bytes: [UInt8], at start: Int) async throws(BlockError) {
        // Of slots that are not in use nothing was asked so far.
        guard start + bytes.count <= count else {
            throw BlockError(
                .corrupt,
                "a LUKS key slot reaches to \(start + bytes.count), past the end of the header's place "
                    + "at \(count)", node: edge.node.name)
        }
        try await checkWrite(offset + start, bytes.count)
        try await edge.write(offset + start, from: try Self.vector(bytes))
    }

    private static func vector(_ bytes: [UInt8]) throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: bytes.count)
        bytes.withUnsafeBytes { vector.copy(from: $0) }
        return vector
    }

    // MARK: Information

    /// With the keys of QMP's `QCryptoBlockInfoLUKS`.
    ///
    /// - Parameter format: stands in it where another format holds the header.
    func information(format: String? = nil) -> JSONObject {
        var data: JSONObject = ["ivgen-alg": .string(header.cipher.generator.name)]
        if let hash = header.cipher.generator.hash {
            data["ivgen-hash-alg"] = .string(hash.rawValue)
        }
        data["hash-alg"] = .string(header.hash.rawValue)
        data["cipher-alg"] = .string(header.cipher.algorithm.rawValue)
        data["uuid"] = .string(header.uuid)
        if let format { data["format"] = .string(format) }
        data["cipher-mode"] = .string(header.cipher.mode.rawValue)
        data["slots"] = .array(
            header.slots.map { slot in
                var value: JSONObject = ["active": .bool(slot.isActive)]
                if slot.isActive { value["iters"] = .integer(slot.iterations) }
                value["key-offset"] = .integer(slot.materialOffset)
                if slot.isActive { value["stripes"] = .integer(slot.stripes) }
                return .object(value)
            })
        data["payload-offset"] = .integer(header.payloadOffset)
        data["master-key-iters"] = .integer(header.masterIterations)
        return data
    }
}
