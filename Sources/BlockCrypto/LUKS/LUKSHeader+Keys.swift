import BlockCore

// The keys of a header. Everything here is CPU-heavy: for worker threads.

extension LUKSHeader {
    /// A header for a new volume, with no passphrase yet.
    ///
    /// - Parameter isDetached: the data goes elsewhere, from its beginning.
    /// - Returns: the header, and the master key that it knows the digest of.
    public static func make(
        _ options: LUKSCreationOptions, isDetached: Bool = false
    ) throws(BlockError) -> (header: LUKSHeader, masterKey: SecretBytes) {
        try checkTime(options.iterationMilliseconds)
        let masterKey = SecretBytes.random(count: options.cipher.keySize)
        let salt = CryptoLibrary.randomBytes(LUKS.saltSize)
        // The digest is computed beside a slot's key each time: it gets an eighth of the time.
        let iterations = try iterations(
            options.hash, LUKS.digestSize, milliseconds: options.iterationMilliseconds, divisor: 8)
        let digest = try options.hash.derive(
            LUKS.digestSize, from: masterKey, salt: salt, iterations: iterations)
        let span = LUKS.materialSpan(keySize: options.cipher.keySize)
        let slots = (0..<LUKS.slotCount).map { number in
            Slot(
                isActive: false, iterations: 0,
                salt: [UInt8](repeating: 0, count: LUKS.saltSize),
                materialOffset: LUKS.slotAlignment + number * span,
                stripes: LUKS.Limit.stripeCount)
        }
        let header = LUKSHeader(
            cipher: options.cipher, hash: options.hash,
            payloadOffset: isDetached ? 0 : LUKS.payloadOffset(options.cipher),
            masterDigest: digest.withBytes { Array($0) }, masterSalt: salt,
            masterIterations: iterations, uuid: randomUUID(), slots: slots)
        return (header, masterKey)
    }

    private static func checkTime(_ milliseconds: Int) throws(BlockError) {
        guard milliseconds > 0, milliseconds <= LUKS.Limit.iterationMillisecondsMax else {
            throw BlockError(
                .invalidArgument,
                "'iter-time' must be 1 to \(LUKS.Limit.iterationMillisecondsMax) milliseconds, not "
                    + "\(milliseconds)")
        }
    }

    private static func iterations(
        _ hash: HashAlgorithm, _ keySize: Int, milliseconds: Int, divisor: Int
    ) throws(BlockError) -> Int {
        let rate = try hash.iterationsPerSecond(keySize: keySize)
        let count = rate.multiplied(by: milliseconds).map { $0 / 1000 / divisor } ?? .max
        return min(max(count, LUKS.Limit.iterationsMin), LUKS.Limit.iterationsMax)
    }

    private static func randomUUID() -> String {
        var bytes = CryptoLibrary.randomBytes(16)
        // Version 4, variant 1 (RFC 9562 §5.4).
        bytes[6] = bytes[6] & 0x0f | 0x40
        bytes[8] = bytes[8] & 0x3f | 0x80
        var text = ""
        for (index, byte) in bytes.enumerated() {
            if [4, 6, 8, 10].contains(index) { text += "-" }
            text += byte < 16 ? "0\(String(byte, radix: 16))" : String(byte, radix: 16)
        }
        return text
    }

    // MARK: Slots

    /// Rounds of HMAC that it takes to find out that a passphrase opens no slot.
    public var unlockRounds: Int {
        slots.filter(\.isActive).reduce(0) { sum, slot in
            sum + KeyDerivation.rounds(hash, keySize, iterations: slot.iterations)
                + KeyDerivation.rounds(hash, LUKS.digestSize, iterations: masterIterations)
        }
    }

    /// - Throws: `exhausted` where trying a passphrase would take too long: a hostile header can ask for
    ///   hours.
    public func checkUnlockRounds() throws(BlockError) {
        guard unlockRounds <= LUKS.Limit.unlockRoundsMax else {
            throw BlockError(
                .exhausted,
                "trying a passphrase on the key slots would take \(unlockRounds) rounds of "
                    + "'\(hash.rawValue)', more than \(LUKS.Limit.unlockRoundsMax)",
                remedy: "if the image can be trusted, set its keys anew with a shorter iter-time")
        }
    }

    /// Makes the key that opens the material of slot `number`.
    public func slotKey(
        _ number: Int, _ passphrase: SecretBytes
    ) throws(BlockError) -> KeyDerivation {
        let slot = slots[number]
        return try KeyDerivation(
            hash, keySize, from: passphrase, salt: slot.salt, iterations: slot.iterations)
    }

    /// The master key that `slotKey` gives, right or wrong.
    ///
    /// - Parameter material: the slot's, as it stands on disk.
    public func candidate(
        inSlot number: Int, _ slotKey: SecretBytes, material: [UInt8]
    ) throws(BlockError) -> SecretBytes {
        let slot = slots[number]
        precondition(material.count == materialRange(of: number).count)
        let clear = try transform(material, slotKey, encrypts: false)
        let merged = clear.withBytes { bytes -> Result<SecretBytes, BlockError> in
            do throws(BlockError) {
                let split = UnsafeRawBufferPointer(rebasing: bytes[..<(keySize * slot.stripes)])
                return .success(try AntiForensicSplitter.merge(split, size: keySize, hash))
            } catch {
                return .failure(error)
            }
        }
        return try merged.get()
    }

    /// Makes the digest by which a master key is known.
    public func digest(of candidate: SecretBytes) throws(BlockError) -> KeyDerivation {
        try KeyDerivation(
            hash, LUKS.digestSize, from: candidate, salt: masterSalt, iterations: masterIterations)
    }

    /// Whether `digest` is the master key's.
    public func isMasterDigest(_ digest: SecretBytes) -> Bool {
        digest.isEqual(to: SecretBytes(masterDigest))
    }

    /// Makes `passphrase` open slot `number`.
    ///
    /// - Returns: the slot's material, to be on disk before the header is.
    public mutating func setSlot(
        _ number: Int, _ passphrase: SecretBytes, _ masterKey: SecretBytes,
        iterationMilliseconds: Int
    ) throws(BlockError) -> [UInt8] {
        try Self.checkTime(iterationMilliseconds)
        var slot = slots[number]
        slot.salt = CryptoLibrary.randomBytes(LUKS.saltSize)
        slot.iterations = try Self.iterations(
            hash, keySize, milliseconds: iterationMilliseconds, divisor: 1)
        let slotKey = try hash.derive(
            keySize, from: passphrase, salt: slot.salt, iterations: slot.iterations)
        var split = try AntiForensicSplitter.split(masterKey, stripes: slot.stripes, hash)
        let padding = materialRange(of: number).count - split.count
        split.append(contentsOf: [UInt8](repeating: 0, count: padding))
        let material = try transform(split, slotKey, encrypts: true)
        slot.isActive = true
        var changed = self
        changed.slots[number] = slot
        guard changed.unlockRounds <= LUKS.Limit.unlockRoundsMax else {
            throw BlockError(
                .invalidArgument,
                "with another key of \(iterationMilliseconds) milliseconds, trying a passphrase would "
                    + "take longer than allowed", remedy: "use a shorter 'iter-time'")
        }
        self = changed
        return material.withBytes { Array($0) }
    }

    /// Slot `number` opens to nobody from now on. Its material is to be overwritten on disk as well.
    public mutating func eraseSlot(_ number: Int) {
        slots[number].isActive = false
        slots[number].iterations = 0
        slots[number].salt = [UInt8](repeating: 0, count: LUKS.saltSize)
    }

    /// Slots count their sectors from 0.
    private func transform(
        _ material: [UInt8], _ key: SecretBytes, encrypts: Bool
    ) throws(BlockError) -> SecretBytes {
        let sectors = try SectorCipher(cipher, key: key)
        var failure: BlockError?
        let result = SecretBytes(count: material.count) { output in
            output.copyBytes(from: material)
            do throws(BlockError) {
                if encrypts {
                    try sectors.encrypt(UnsafeRawBufferPointer(output), into: output, sector: 0)
                } else {
                    try sectors.decrypt(output, sector: 0)
                }
            } catch {
                failure = error
            }
        }
        if let failure { throw failure }
        return result
    }
}
