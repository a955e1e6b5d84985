import BlockCore

/// The header of a LUKS1 volume (§Figures 1 to 4).
///
/// ```
///   0 magic          6 version         8 cipher name     40 cipher mode    72 hash
/// 104 payload      108 key bytes     112 key digest     132 its salt      164 its iterations
/// 168 UUID         208 eight slots of 48: state, iterations, salt, material's sector, stripes
/// ```
/// Invariant: whoever holds one may use its offsets and sizes: they are within the named limits, and
/// the material of no slot reaches into the header, another slot's or the payload.
public struct LUKSHeader: Sendable, Equatable {
    public struct Slot: Sendable, Equatable {
        public var isActive: Bool
        public var iterations: Int
        var salt: [UInt8]
        /// Of the key material, in bytes.
        public var materialOffset: Int
        public var stripes: Int
    }

    public internal(set) var cipher: CipherSpecification
    public internal(set) var hash: HashAlgorithm
    /// Where the encrypted sectors begin, in bytes; 0 in headers that stand apart from their data.
    public internal(set) var payloadOffset: Int
    var masterDigest: [UInt8]
    var masterSalt: [UInt8]
    public internal(set) var masterIterations: Int
    public internal(set) var uuid: String
    public internal(set) var slots: [Slot]

    public var keySize: Int { cipher.keySize }

    /// The bytes of a slot's key material.
    public func materialRange(of slot: Int) -> ByteRange {
        // Whole sectors: not all keys fill the last one.
        ByteRange(slots[slot].materialOffset, (keySize * LUKS.Limit.stripeCount + 511) & ~511)
    }

    /// Bytes that the header and all its slots take.
    public var end: Int {
        var end = LUKS.headerSize
        for slot in 0..<LUKS.slotCount { end = max(end, materialRange(of: slot).end) }
        return end
    }
}

extension LUKSHeader {
    /// Whether bytes begin like a LUKS1 header.
    public static func matches(_ start: UnsafeRawBufferPointer) -> Bool {
        start.count >= 8 && start.prefix(6).elementsEqual(LUKS.magic)
            && start.bigEndian(at: 6, as: UInt16.self) == 1
    }

    /// Parses and validates a header.
    ///
    /// - Parameters:
    ///   - bytes: ``LUKS/headerSize`` of them, or more.
    ///   - isDetached: the data is elsewhere: the payload offset says nothing.
    /// - Throws: `wrongFormat`, `unsupported` for algorithms and versions that are not there, `corrupt`.
    public init(
        parsing bytes: UnsafeRawBufferPointer, isDetached: Bool = false
    ) throws(BlockError) {
        guard bytes.count >= LUKS.headerSize, bytes.prefix(6).elementsEqual(LUKS.magic) else {
            throw BlockError(.wrongFormat, "there is no LUKS header")
        }
        let version: UInt16 = bytes.bigEndian(at: 6)
        guard version == 1 else {
            throw BlockError(.unsupported, "LUKS version \(version) is not supported")
        }
        let hashName = Self.text(bytes, at: 72)
        guard let hash = HashAlgorithm(rawValue: hashName) else {
            throw BlockError(.unsupported, "LUKS hash '\(hashName)' is not supported")
        }
        self.hash = hash
        let keySize = Int(bytes.bigEndian(at: 108, as: UInt32.self))
        cipher = try Self.cipher(
            Self.text(bytes, at: 8), mode: Self.text(bytes, at: 40), keySize: keySize)
        payloadOffset = Int(bytes.bigEndian(at: 104, as: UInt32.self)) * LUKS.sectorSize
        if isDetached { payloadOffset = 0 }
        masterDigest = Array(bytes[112..<132])
        masterSalt = Array(bytes[132..<164])
        masterIterations = Int(bytes.bigEndian(at: 164, as: UInt32.self))
        uuid = Self.text(bytes, at: 168, count: 40)
        slots = try (0..<LUKS.slotCount).map { number throws(BlockError) in
            try Self.slot(bytes, number)
        }
        try check(isDetached: isDetached)
    }

    /// Text that ends at a zero byte or at the end of its field.
    private static func text(
        _ bytes: UnsafeRawBufferPointer, at offset: Int, count: Int = 32
    ) -> String {
        String(
            decoding: bytes[offset..<(offset + count)].prefix { $0 != 0 }, as: UTF8.self)
    }

    private static func cipher(
        _ name: String, mode text: String, keySize: Int
    ) throws(BlockError) -> CipherSpecification {
        guard name == "aes" else {
            throw BlockError(.unsupported, "LUKS cipher '\(name)' is not supported")
        }
        let parts = text.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
        guard let mode = CipherMode(rawValue: String(parts[0])) else {
            throw BlockError(.unsupported, "LUKS cipher mode '\(text)' is not supported")
        }
        let algorithm = CipherAlgorithm.allCases.first {
            keySize == (mode == .xts ? 2 : 1) * $0.keySize
        }
        guard let algorithm else {
            throw BlockError(
                .corrupt,
                "the LUKS header has a key of \(keySize) bytes, which '\(name)' with "
                    + "'\(text)' does not take")
        }
        let generator = try Self.generator(parts.count > 1 ? String(parts[1]) : "", mode)
        return try CipherSpecification(algorithm, mode, generator)
    }

    private static func generator(
        _ text: String, _ mode: CipherMode
    ) throws(BlockError) -> IVGenerator {
        switch text {
        case "plain": return .plain
        case "plain64": return .plain64
        case "" where mode == .ecb: return .plain
        default:
            if text.hasPrefix("essiv:"),
                let hash = HashAlgorithm(rawValue: String(text.dropFirst(6)))
            {
                return .essiv(hash)
            }
            throw BlockError(.unsupported, "LUKS sector vectors '\(text)' are not supported")
        }
    }

    private static func slot(
        _ bytes: UnsafeRawBufferPointer, _ number: Int
    ) throws(BlockError) -> Slot {
        let start = 208 + number * 48
        let state: UInt32 = bytes.bigEndian(at: start)
        guard state == LUKS.slotActive || state == LUKS.slotInactive else {
            throw BlockError(
                .corrupt, "LUKS key slot \(number) has state 0x\(String(state, radix: 16))")
        }
        return Slot(
            isActive: state == LUKS.slotActive,
            iterations: Int(bytes.bigEndian(at: start + 4, as: UInt32.self)),
            salt: Array(bytes[(start + 8)..<(start + 40)]),
            materialOffset: Int(bytes.bigEndian(at: start + 40, as: UInt32.self))
                * LUKS.sectorSize,
            stripes: Int(bytes.bigEndian(at: start + 44, as: UInt32.self)))
    }

    private func check(isDetached: Bool) throws(BlockError) {
        guard masterIterations >= 1, masterIterations <= LUKS.Limit.iterationsMax else {
            throw BlockError(
                .corrupt, "\(masterIterations) iterations of the LUKS master key are out of bounds")
        }
        for (number, slot) in slots.enumerated() {
            guard slot.stripes == LUKS.Limit.stripeCount else {
                throw BlockError(
                    .corrupt,
                    "LUKS key slot \(number) has \(slot.stripes) stripes, not "
                        + "\(LUKS.Limit.stripeCount)")
            }
            if slot.isActive {
                guard slot.iterations >= 1, slot.iterations <= LUKS.Limit.iterationsMax else {
                    throw BlockError(
                        .corrupt,
                        "\(slot.iterations) iterations of LUKS key slot \(number) are out of bounds"
                    )
                }
            }
            try checkPlace(of: number, isDetached: isDetached)
        }
        guard isDetached || payloadOffset >= LUKS.headerSize else {
            throw BlockError(
                .corrupt, "the LUKS payload at \(payloadOffset) begins within the header",
                remedy: "give the header's own file as 'header' where it stands apart")
        }
    }

    private func checkPlace(of number: Int, isDetached: Bool) throws(BlockError) {
        let material = materialRange(of: number)
        guard material.offset >= LUKS.headerSize else {
            throw BlockError(.corrupt, "LUKS key slot \(number) lies within the header")
        }
        // A header apart from its data says 0, or where the data would be.
        guard payloadOffset == 0 || material.end <= payloadOffset || isDetached else {
            throw BlockError(.corrupt, "LUKS key slot \(number) reaches into the payload")
        }
        for other in 0..<number where materialRange(of: other).overlaps(material) {
            throw BlockError(.corrupt, "LUKS key slots \(other) and \(number) overlap")
        }
    }

    // MARK: Writing

    /// The header's bytes.
    public func serialised() -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: LUKS.headerSize)
        bytes.withUnsafeMutableBytes { out in
            out.copyBytes(from: LUKS.magic)
            out.storeBigEndian(UInt16(1), at: 6)
            Self.store("aes", in: out, at: 8)
            Self.store(modeText, in: out, at: 40)
            Self.store(hash.rawValue, in: out, at: 72)
            out.storeBigEndian(UInt32(truncatingIfNeeded: payloadOffset / 512), at: 104)
            out.storeBigEndian(UInt32(keySize), at: 108)
            Self.store(masterDigest, in: out, at: 112)
            Self.store(masterSalt, in: out, at: 132)
            out.storeBigEndian(UInt32(truncatingIfNeeded: masterIterations), at: 164)
            Self.store(uuid, in: out, at: 168)
            for (number, slot) in slots.enumerated() {
                let start = 208 + number * 48
                out.storeBigEndian(
                    slot.isActive ? LUKS.slotActive : LUKS.slotInactive, at: start)
                out.storeBigEndian(UInt32(truncatingIfNeeded: slot.iterations), at: start + 4)
                Self.store(slot.salt, in: out, at: start + 8)
                out.storeBigEndian(
                    UInt32(truncatingIfNeeded: slot.materialOffset / 512), at: start + 40)
                out.storeBigEndian(UInt32(truncatingIfNeeded: slot.stripes), at: start + 44)
            }
        }
        return bytes
    }

    /// `xts-plain64`, `cbc-essiv:sha256`.
    var modeText: String {
        if cipher.mode == .ecb { return "ecb" }
        let suffix = cipher.generator.hash.map { ":\($0.rawValue)" } ?? ""
        return "\(cipher.mode.rawValue)-\(cipher.generator.name)\(suffix)"
    }

    private static func store(
        _ text: String, in out: UnsafeMutableRawBufferPointer, at offset: Int
    ) {
        store(Array(text.utf8), in: out, at: offset)
    }

    private static func store(
        _ bytes: [UInt8], in out: UnsafeMutableRawBufferPointer, at offset: Int
    ) {
        UnsafeMutableRawBufferPointer(rebasing: out[offset..<(offset + bytes.count)])
            .copyBytes(from: bytes)
    }
}
