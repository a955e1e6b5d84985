import BlockCore
import BlockGraph
import ImageTools
import StorageDaemon

/// How `serve` opens its image.
extension ServeOptions {
    func source() throws(BlockError) -> ImageSource {
        var source = ImageSource(file ?? "", format: format, isOptions: imageOptions)
        // A temporary overlay takes the writes.
        source.isWritable = isWritable && !snapshot
        source.cache = nocache ? .none : try CacheMode(named: cache ?? "writeback")
        source.discards = try ImageSource.discards(mode: discard ?? "ignore")
        source.zeroDetection = detectZeroes
        source.asynchronousIO = aio
        source.isUntrusted = untrusted
        source.warnOfProbing()
        return source
    }

    /// Opens the image, held as "command".
    func open(
        _ source: ImageSource, in session: ToolSession
    ) async throws(BlockError) -> BlockNode {
        var start = 0
        if let offset { start = try ArgumentText.size(offset, "the offset") }
        guard snapshot || loadSnapshot != nil else {
            return try await session.open(source, from: start)
        }
        var node = try await session.open(source)
        if let loadSnapshot { node = try await session.openSnapshot(loadSnapshot, of: node) }
        if snapshot, isWritable {
            node = try await session.openOverlay(above: node, in: ToolSession.temporaryFolder)
        }
        if start > 0 { node = try await session.openWindow(of: node, from: start) }
        return node
    }
}
