import BlockCore
import Testing

@testable import BlockCrypto

func bytes(_ hex: String) -> [UInt8] {
    let digits = hex.filter { !$0.isWhitespace }.compactMap(\.hexDigitValue)
    return stride(from: 0, to: digits.count - 1, by: 2).map {
        UInt8(digits[$0] << 4 | digits[$0 + 1])
    }
}

extension SecretBytes {
    var array: [UInt8] { withBytes { Array($0) } }
}

@Suite struct AlgorithmTests {
    @Test(arguments: [
        (HashAlgorithm.sha1, "a9993e36 4706816a ba3e2571 7850c26c 9cd0d89d"),
        (
            .sha256,
            "ba7816bf 8f01cfea 414140de 5dae2223 b00361a3 96177a9c b410ff61 f20015ad"
        ),
    ])
    func digestsAreThoseOfTheStandard(hash: HashAlgorithm, expected: String) throws {
        #expect(try hash.digest(Array("abc".utf8)) == bytes(expected))
    }

    @Test func everyDigestHasItsSize() throws {
        for hash in HashAlgorithm.allCases {
            #expect(try hash.digest([1, 2, 3]).count == hash.digestSize)
        }
    }

    /// RFC 6070.
    @Test func derivedKeysAreThoseOfTheStandard() throws {
        let key = try HashAlgorithm.sha1.derive(
            20, from: SecretBytes(Array("password".utf8)), salt: Array("salt".utf8),
            iterations: 4096)
        #expect(key.array == bytes("4b007901 b765489a bead49d9 26f721d0 65a429c1"))
    }

    struct Derivation: Sendable {
        let hash: HashAlgorithm
        let count: Int
        let iterations: Int
        let passwordCount: Int
        let key: String
    }

    /// Computed with Python's hashlib: passwords longer than a digest's block, keys of several blocks.
    @Test(
        "keys made in slices are the same",
        arguments: [
            Derivation(
                hash: .sha256, count: 64, iterations: 1000, passwordCount: 70,
                key: "b166353b05d824b6f7ff06ec182a5787a59724f1c0a802c478e37bf025fb01e0"
                    + "a0b4490e518daaa20a224fbe4a7d0af01639c6a8459bb8f67fd1df0fb691bba1"),
            Derivation(
                hash: .sha512, count: 100, iterations: 77, passwordCount: 200,
                key: "d7275c60ee828edf96adf850d0ada8472cfb5278cf76dee869a322f8f0215b9d"
                    + "43802dae97f1414f207c13a7e2043ad65bb84d632d0566ae084dd941f083214b"
                    + "a1ea7aef1cc2d05367d0a255ea54823e42f8be0dbccc4440abaf838dae7705f2"
                    + "749e4414"),
            Derivation(
                hash: .sha224, count: 5, iterations: 1, passwordCount: 0,
                key: "d6de928dce"),
            Derivation(
                hash: .sha1, count: 40, iterations: 50, passwordCount: 64,
                key: "87a8a8bec826df8288a13870809d4f5637926bac7e4b14ed824361a131f1853c"
                    + "62181ddd813732df"),
            Derivation(
                hash: .sha384, count: 96, iterations: 3, passwordCount: 128,
                key: "43e1a4121400541579ed453ee8f8295061a8418dfe64969f9ee2a3ed3eeb8c92"
                    + "5f420b8a64395bde5530ac0d3c8d3e9664f3e1dd1e12bc06728191ac180a5da2"
                    + "34c7686195dec0b6943d40687eff73122ee65aa83fed5394bbf36a261ba87a7d"),
        ], [1, 7, 300, Int.max])
    func slices(_ vector: Derivation, _ slice: Int) throws {
        let password = [UInt8](repeating: 0x78, count: vector.passwordCount)
        let work = try KeyDerivation(
            vector.hash, vector.count, from: SecretBytes(password), salt: Array("NaCl".utf8),
            iterations: vector.iterations)
        while !work.isFinished { try work.advance(slice) }
        #expect(try work.key.array == bytes(vector.key))
    }

    /// IEEE 1619, vector 4: XTS-AES-128, data unit 0.
    @Test func sectorsAreEncryptedAsTheStandardSays() throws {
        let key = SecretBytes(
            bytes("27182818284590452353602874713526 31415926535897932384626433832795"))
        let cipher = try SectorCipher(
            try CipherSpecification(.aes128, .xts, .plain64), key: key)
        let clear = (0..<512).map { UInt8($0 & 255) }
        let encrypted = try encrypt(clear, cipher, sector: 0)
        #expect(
            encrypted.prefix(32)
                == bytes("27a7479befa1d476489f308cd4cfa6e2 a96e4bbe3208ff25287dd3819616e89c")[...])
        #expect(
            encrypted.suffix(16) == bytes("0a282df920147beabe421ee5319d0568")[...])
    }

    private func encrypt(
        _ clear: [UInt8], _ cipher: SectorCipher, sector: UInt64
    ) throws -> [UInt8] {
        var result = clear
        try result.withUnsafeMutableBytes {
            try cipher.encrypt(UnsafeRawBufferPointer($0), into: $0, sector: sector)
        }
        return result
    }

    private static let specifications: [CipherSpecification] = {
        var all: [CipherSpecification] = []
        for algorithm in CipherAlgorithm.allCases {
            for mode in CipherMode.allCases {
                for generator in [IVGenerator.plain, .plain64, .essiv(.sha256)] {
                    if let one = try? CipherSpecification(algorithm, mode, generator) {
                        all.append(one)
                    }
                }
            }
        }
        return all
    }()

    @Test func whatWasEncryptedIsDecrypted() throws {
        #expect(Self.specifications.count == 24)
        for specification in Self.specifications {
            let cipher = try SectorCipher(
                specification, key: .random(count: specification.keySize))
            let clear = (0..<2048).map { UInt8($0 % 251) }
            let first = UInt64(UInt32.max) - 1
            var data = try encrypt(clear, cipher, sector: first)
            #expect(data != clear)
            // A sector does not depend on those before it.
            let alone = try encrypt(Array(clear[1024..<1536]), cipher, sector: first + 2)
            #expect(alone[...] == data[1024..<1536], "\(specification)")
            try data.withUnsafeMutableBytes { try cipher.decrypt($0, sector: first) }
            #expect(data == clear, "\(specification)")
        }
    }

    @Test func plainVectorsForgetHighBits() throws {
        let zeroes = [UInt8](repeating: 0, count: 512)
        let key = SecretBytes.random(count: 32)
        let plain = try SectorCipher(try CipherSpecification(.aes256, .cbc, .plain), key: key)
        let plain64 = try SectorCipher(try CipherSpecification(.aes256, .cbc, .plain64), key: key)
        let high = UInt64(1) << 32
        #expect(
            try encrypt(zeroes, plain, sector: 5) == encrypt(zeroes, plain, sector: high + 5))
        #expect(
            try encrypt(zeroes, plain64, sector: 5) != encrypt(zeroes, plain64, sector: high + 5))
    }

    @Test func keysOfTheWrongLengthAreRefused() throws {
        #expect(throws: BlockError.self) {
            try SectorCipher(
                try CipherSpecification(.aes256, .xts, .plain64), key: .random(count: 32))
        }
    }

    @Test func splitKeysComeTogether() throws {
        for hash in HashAlgorithm.allCases {
            for count in [16, 24, 32, 64] {
                let key = SecretBytes.random(count: count)
                let material = try AntiForensicSplitter.split(key, stripes: 17, hash)
                #expect(material.count == 17 * count)
                let merged = try material.withUnsafeBytes {
                    try AntiForensicSplitter.merge($0, size: count, hash)
                }
                #expect(merged.isEqual(to: key))
                var damaged = material
                damaged[count * 3] ^= 1
                let wrong = try damaged.withUnsafeBytes {
                    try AntiForensicSplitter.merge($0, size: count, hash)
                }
                #expect(!wrong.isEqual(to: key))
            }
        }
    }
}
