import BlockCore

/// Spreads a key over so many bytes that destroying any of them destroys the key (LUKS1 on-disk
/// format, §2.4 anti-forensic information splitter).
///
/// ```
/// stripe 0 … n-2: random.   d = 0; for each of them: d = diffuse(d xor stripe)
/// stripe n-1: d xor key
/// ```
enum AntiForensicSplitter {
    /// - Returns: `stripes` times as many bytes as the key has.
    static func split(
        _ key: SecretBytes, stripes: Int, _ hash: HashAlgorithm
    ) throws(BlockError) -> [UInt8] {
        let size = key.count
        var material = CryptoLibrary.randomBytes(size * (stripes - 1))
        var block = [UInt8](repeating: 0, count: size)
        for stripe in 0..<(stripes - 1) {
            for index in 0..<size { block[index] ^= material[stripe * size + index] }
            block = try diffuse(block, hash)
        }
        key.withBytes { bytes in
            for index in 0..<size { material.append(block[index] ^ bytes[index]) }
        }
        return material
    }

    /// The key of `size` bytes that was split into `material`.
    static func merge(
        _ material: UnsafeRawBufferPointer, size: Int, _ hash: HashAlgorithm
    ) throws(BlockError) -> SecretBytes {
        precondition(size > 0 && material.count % size == 0 && material.count >= size)
        let last = material.count / size - 1
        var block = [UInt8](repeating: 0, count: size)
        for stripe in 0..<last {
            for index in 0..<size { block[index] ^= material[stripe * size + index] }
            block = try diffuse(block, hash)
        }
        for index in 0..<size { block[index] ^= material[last * size + index] }
        return SecretBytes(block)
    }

    /// Each piece as long as a digest becomes the digest of its number and itself.
    private static func diffuse(
        _ block: [UInt8], _ hash: HashAlgorithm
    ) throws(BlockError) -> [UInt8] {
        var result: [UInt8] = []
        result.reserveCapacity(block.count)
        var number: UInt32 = 0
        while result.count < block.count {
            let count = min(hash.digestSize, block.count - result.count)
            var input = withUnsafeBytes(of: number.bigEndian) { [UInt8]($0) }
            input += block[result.count..<(result.count + count)]
            result += try hash.digest(input).prefix(count)
            number += 1
        }
        return result
    }
}

extension HashAlgorithm {
    /// The digest of `bytes`.
    func digest(_ bytes: [UInt8]) throws(BlockError) -> [UInt8] {
        // A typed error does not pass through the closure of `withUnsafeBytes`.
        let result = bytes.withUnsafeBytes { raw -> Result<[UInt8], BlockError> in
            do throws(BlockError) {
                return .success(try digest(raw))
            } catch {
                return .failure(error)
            }
        }
        return try result.get()
    }
}
