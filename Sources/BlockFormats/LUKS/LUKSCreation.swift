import BlockCore
import BlockCrypto
import BlockGraph
import QMP

/// Makes new encrypted disks, as `blockdev-create` with driver `luks` does.
enum LUKSCreation {
    static func create(_ creation: ImageCreation) async throws(BlockError) {
        let options = creation.options
        guard let size = try options.size("size") else {
            throw BlockError(.invalidArgument, "option 'size' is missing")
        }
        let preallocation =
            try options.enumeration("preallocation", as: Preallocation.self) ?? .off
        guard preallocation != .metadata else {
            throw BlockError(.invalidArgument, "encrypted disks have no metadata to preallocate")
        }
        let luks = try EncryptionOptions.creation(options)
        guard let passphrase = try EncryptionOptions.passphrase(options, creation.graph) else {
            throw BlockError(
                .invalidArgument, "option 'key-secret' is missing",
                remedy: "name a secret object that holds the passphrase")
        }
        let isDetached = try options.value("header") != nil
        let payload = isDetached ? 0 : LUKS.payloadOffset(luks.cipher)
        guard let end = size.adding(payload), end <= Limits.nodeSizeMax else {
            throw BlockError(.invalidArgument, "a disk of \(size) bytes is out of bounds")
        }
        _ = try options.value("file")
        try options.finish()
        // Nothing is touched before all is known to be good.
        let file = try await creation.target("file")
        let header = isDetached ? try await creation.target("header") : file
        if isDetached { try await makeRoom(LUKS.payloadOffset(luks.cipher), .off, header) }
        try await makeRoom(end, preallocation, file)
        _ = try await LUKSArea.create(luks, passphrase, header, at: 0, isDetached: isDetached)
        try await header.flush()
    }

    private static func makeRoom(
        _ end: Int, _ preallocation: Preallocation, _ target: Edge
    ) async throws(BlockError) {
        do throws(BlockError) {
            try await target.resize(to: 0)
            try await target.resize(to: end, preallocation)
        } catch  where error.code == .unsupported {
            guard target.size >= end else {
                throw BlockError(
                    .noSpace,
                    "the image needs \(end) bytes, '\(target.node.name)' has \(target.size)")
            }
        }
    }
}
