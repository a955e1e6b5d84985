import BlockCore
import BlockGraph

// Persistent dirty bitmaps go with the data (`--bitmaps`): name, granularity, flags and content.
//
// They are made on the target when all data is there, so that none of them records the copying.

extension ImageConvert {
    /// The source's bitmaps that are to be copied.
    ///
    /// - Throws: `unsupported` where the source cannot have any; `corrupt` for one that is inconsistent,
    ///   unless these are skipped, with a warning each.
    func bitmaps(of source: BlockNode) async throws(BlockError) -> [DirtyBitmap] {
        guard copiesBitmaps else { return [] }
        guard source.driver.bitmapStore != nil else {
            throw BlockError(
                .unsupported, "the source's driver '\(source.description.name)' keeps no bitmaps")
        }
        var result: [DirtyBitmap] = []
        for bitmap in source.dirtyBitmaps where bitmap.isPersistent {
            await bitmap.load()
            guard bitmap.isInconsistent else {
                result.append(bitmap)
                continue
            }
            guard skipsBrokenBitmaps else {
                throw BlockError(
                    .corrupt, "the bitmap '\(bitmap.name)' is inconsistent and cannot be copied",
                    remedy: "leave such bitmaps out with --skip-broken-bitmaps, or remove it with "
                        + "'bitmap --remove'")
            }
            warn("skipping the inconsistent bitmap '\(bitmap.name)'")
        }
        return result
    }

    /// Whether the target can have them is found out before anything is copied.
    func check(_ bitmaps: [DirtyBitmap], on target: BlockNode) throws(BlockError) {
        guard copiesBitmaps else { return }
        guard let store = target.driver.bitmapStore else { throw Self.noBitmaps(targetFormat) }
        for bitmap in bitmaps {
            guard target.dirtyBitmap(named: bitmap.name) == nil else {
                throw BlockError(
                    .alreadyExists, "the target has a bitmap '\(bitmap.name)' already")
            }
            guard bitmap.size == target.size else {
                throw BlockError(
                    .invalidArgument,
                    "bitmaps of \(bitmap.size) bytes do not fit a target of \(target.size) bytes")
            }
            try store.checkStorable(name: bitmap.name, granularity: bitmap.granularity)
        }
    }

    static func noBitmaps(_ format: String) -> BlockError {
        BlockError(
            .unsupported, "images of format '\(format)' keep no bitmaps", remedy: "use -O qcow2")
    }

    /// Makes them; durable when the target is closed.
    func copy(_ bitmaps: [DirtyBitmap], to target: BlockNode) async throws(BlockError) {
        for bitmap in bitmaps {
            let copy = try await target.makeDirtyBitmap(
                named: bitmap.name, granularity: bitmap.granularity, persistent: true,
                enabled: bitmap.isEnabled)
            try await target.mergeDirtyBitmaps([bitmap], into: copy)
        }
    }
}
