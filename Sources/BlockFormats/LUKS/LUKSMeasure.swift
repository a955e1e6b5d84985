import BlockCore
import BlockCrypto
import BlockGraph
import QMP

/// Works out the storage that a new encrypted disk takes: header and key slots, and the disk as it is.
enum LUKSMeasure {
    static func measure(_ options: OptionReader) throws(BlockError) -> StorageNeed {
        guard let size = try options.size("size") else {
            throw BlockError(.invalidArgument, "option 'size' is missing")
        }
        _ = try options.enumeration("preallocation", as: Preallocation.self)
        let luks = try EncryptionOptions.creation(options)
        guard try options.string("key-secret") != nil else {
            throw BlockError(
                .invalidArgument, "option 'key-secret' is missing",
                remedy: "name a secret object that holds the passphrase")
        }
        try options.finish()
        guard let end = size.adding(LUKS.payloadOffset(luks.cipher)), end <= Limits.nodeSizeMax
        else {
            throw BlockError(.invalidArgument, "a disk of \(size) bytes is out of bounds")
        }
        return StorageNeed(fixedBytes: end, unit: 0, fullBytes: end)
    }
}
