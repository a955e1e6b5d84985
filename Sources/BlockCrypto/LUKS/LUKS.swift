import BlockCore

/// LUKS version 1: the encryption header of disks and images.
///
/// ```
/// 0            4 KiB                                                    payload
/// ┌───────────┬──────────────┬──────────────┬─────┬──────────────┬────┬─────────
/// │ header    │ key slot 0   │ key slot 1   │  …  │ key slot 7   │    │ sectors…
/// └───────────┴──────────────┴──────────────┴─────┴──────────────┴────┴─────────
/// ```
/// A slot holds the master key, split over 4000 stripes and encrypted with a key that PBKDF2 makes of a
/// passphrase. Numbers are big-endian. Section names in comments are those of the LUKS1 on-disk
/// format specification, 1.2.3.
public enum LUKS {
    /// What a header may ask for. Bytes unless the name says otherwise.
    public enum Limit {
        /// PBKDF2 iterations of a slot.
        public static let iterationsMax = 1 << 28
        /// Rounds of HMAC that trying a passphrase on all slots may take: eight slots of two seconds each
        /// on a fast machine, and two minutes on a slow one.
        public static let unlockRoundsMax = 1 << 28
        /// Rounds of HMAC that are done in one go: some tens of milliseconds.
        public static let roundsAtOnce = 1 << 15
        /// What the specification asks for at least.
        public static let iterationsMin = 1000
        /// The specification's only count.
        public static let stripeCount = 4000
        public static let passphraseBytesMax = 2 << 20
        /// Where slots and payload may begin: 32-bit sector numbers.
        public static let offsetMax = Int(UInt32.max) * 512
        /// `iter-time`, in milliseconds.
        public static let iterationMillisecondsMax = 600_000
    }

    public static let slotCount = 8
    public static let sectorSize = 512
    /// Bytes of the header itself (§Figure 1).
    public static let headerSize = 592
    /// Where the first slot's material begins in headers made here, and what all are aligned to.
    static let slotAlignment = 4096
    static let magic: [UInt8] = [0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe]
    static let digestSize = 20
    static let saltSize = 32
    static let slotActive: UInt32 = 0x00ac_71f3
    static let slotInactive: UInt32 = 0x0000_dead

    /// Bytes before the payload of an image that is made with this cipher.
    public static func payloadOffset(_ cipher: CipherSpecification) -> Int {
        slotAlignment + slotCount * materialSpan(keySize: cipher.keySize)
    }

    /// Bytes from one slot's material to the next's.
    static func materialSpan(keySize: Int) -> Int {
        (keySize * Limit.stripeCount + slotAlignment - 1) & ~(slotAlignment - 1)
    }
}

/// How an encrypted image is made.
public struct LUKSCreationOptions: Sendable {
    public var cipher: CipherSpecification
    public var hash: HashAlgorithm
    /// Processor time that trying a passphrase takes.
    public var iterationMilliseconds: Int

    public static let iterationMillisecondsDefault = 2000

    public init(
        _ cipher: CipherSpecification, hash: HashAlgorithm = .sha256,
        iterationMilliseconds: Int = Self.iterationMillisecondsDefault
    ) {
        self.cipher = cipher
        self.hash = hash
        self.iterationMilliseconds = iterationMilliseconds
    }
}
