import BlockCore
import BlockGraph

/// `commit`: writes what an image has into an image below it.
///
/// Order: the data goes into the base and is made durable, then the image is emptied. Cut at any point, the
/// image reads as before.
public struct ImageCommit: Sendable {
    public var source: ImageSource
    /// The image below to write to; `nil` for the one directly below.
    public var base: String?
    /// The image keeps what it has.
    public var dropsImage = false
    /// Bytes a second; 0 for no limit.
    public var rate = 0

    public init(_ source: ImageSource) {
        self.source = source
    }

    public func run(in session: ToolSession, progress: Progress) async throws(BlockError) {
        // Images between the two are of no use afterwards: the top one must not lean on them.
        let keeps = dropsImage || base != nil
        let chain = try await ImageChain.open(source, in: session) { infos throws(BlockError) in
            let index = try self.baseIndex(infos)
            return keeps ? [index] : [0, index]
        }
        let index = try baseIndex(chain.layers.map(\.info))
        let top = try session.graph.attach(
            NamedUser("commit"), to: chain.top,
            Access(uses: keeps ? .consistentRead : [.consistentRead, .write], shares: .all))
        let target = try session.graph.attach(
            NamedUser("commit"), to: chain.layers[index].node,
            Access(uses: [.consistentRead, .write, .resize], shares: .all))
        target.isWriteThrough = source.cache.isWriteThrough
        // A raw file below may end within a sector, as one above may.
        let size =
            target.node.description.name == "raw"
            ? top.size : top.size.roundedUp(to: 512) ?? top.size
        if target.size < top.size { try await target.resize(to: size) }
        try await copy(top, to: target, layers: index, progress)
        try await target.flush()
        if !keeps { try await empty(chain.top) }
        progress.finish()
        try await session.graph.detach(top)
        try await session.graph.detach(target)
        try await session.close(chain)
    }

    private func baseIndex(_ infos: [ImageInfo]) throws(BlockError) -> Int {
        guard infos.count > 1 else {
            throw BlockError(
                .invalidArgument, "'\(source.name)' has no backing image to commit to")
        }
        guard let base else { return 1 }
        let index = infos.indices.dropFirst().first { index in
            let above = infos[index - 1]
            return above.backingName == base || above.backingPath == base
        }
        guard let index else {
            throw BlockError(
                .notFound, "'\(base)' is not in the backing chain of '\(source.name)'")
        }
        return index
    }

    private func copy(
        _ top: Edge, to target: Edge, layers: Int, _ progress: Progress
    ) async throws(BlockError) {
        var settings = ImageCopier.Settings()
        settings.rate = rate
        settings.range = ByteRange(0, top.size)
        progress.begin(top.size)
        let copier = ImageCopier(
            from: try CopySource([top], layers: layers),
            to: CopyTarget(
                target, isZero: false, sparseBytes: ImageConvert.sparseBytesDefault),
            settings, progress)
        try await copier.run()
    }

    private func empty(_ node: BlockNode) async throws(BlockError) {
        guard let image = node.driver as? any BackedImage else {
            throw BlockError(
                .unsupported,
                "images of format '\(node.description.name)' cannot be emptied; the data is in the base",
                remedy: "use -d to keep the image as it is")
        }
        try await image.empty()
    }
}
