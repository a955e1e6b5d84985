import BlockCore
import BlockGraph

/// `bitmap`: changes a dirty bitmap that an image keeps.
public struct ImageBitmap: Sendable {
    public enum Action: Sendable, Equatable {
        case add, remove, clear, enable, disable
        /// Marks what is dirty in the bitmap of that name.
        case merge(String)

        /// For messages: `"add"`.
        var name: String {
            if case .merge = self { return "merge" }
            return "\(self)"
        }
    }

    /// The image; opened for writing.
    public var image: ImageSource
    public var name: String
    /// Carried out one after the other; the image is left as the last good one left it.
    public var actions: [Action] = []
    /// Of a bitmap that is added, in bytes; `nil` takes the image's cluster size, within 4 KiB…64 KiB.
    public var granularity: Int?
    /// The image whose bitmaps are merged; `nil` for the same one.
    public var mergeSource: ImageSource?

    public init(_ image: ImageSource, bitmap name: String) {
        self.image = image
        self.name = name
    }

    /// - Throws: `invalidArgument` when the parts do not go together; then nothing was opened.
    public func check() throws(BlockError) {
        guard !actions.isEmpty else {
            throw BlockError(
                .invalidArgument, "nothing is to be done with the bitmap",
                remedy: "give --add, --remove, --clear, --enable, --disable or --merge")
        }
        if granularity != nil, !actions.contains(.add) {
            throw BlockError(.invalidArgument, "a granularity is for --add only")
        }
        if mergeSource != nil, !actions.contains(where: { $0.name == "merge" }) {
            throw BlockError(.invalidArgument, "a source image is for --merge only")
        }
    }

    public func run(in session: ToolSession) async throws(BlockError) {
        try check()
        var image = image
        image.isWritable = true
        // What lies below says nothing of what changed here.
        image.withoutBacking = true
        let edge = try await session.use(
            image, as: "image bitmap", Access(uses: [.consistentRead, .write], shares: .all))
        var source: Edge?
        if var other = mergeSource {
            other.withoutBacking = true
            source = try await session.use(other, as: "image bitmap")
        }
        var failure: BlockError?
        for action in actions where failure == nil {
            do throws(BlockError) {
                try await carryOut(action, edge.node, source?.node ?? edge.node)
            } catch {
                failure = error.doing("cannot \(action.name) the bitmap '\(name)'")
            }
        }
        // Closed in order all the same: what was done before is stored.
        if let source { try await session.graph.detach(source) }
        try await session.graph.detach(edge)
        if let failure { throw failure }
    }

    private func carryOut(
        _ action: Action, _ node: BlockNode, _ source: BlockNode
    ) async throws(BlockError) {
        if action == .add {
            _ = try await node.makeDirtyBitmap(
                named: name, granularity: granularity, persistent: true)
            return
        }
        let bitmap = try node.requireDirtyBitmap(named: name)
        switch action {
        case .add: return
        case .remove:
            try bitmap.check([.busy, .readOnly])
            try await node.discardDirtyBitmap(bitmap)
        case .clear: try await node.clearDirtyBitmap(bitmap)
        case .enable: try await node.setDirtyBitmap(bitmap, enabled: true)
        case .disable: try await node.setDirtyBitmap(bitmap, enabled: false)
        case .merge(let other):
            try await node.mergeDirtyBitmaps(
                [try source.requireDirtyBitmap(named: other)], into: bitmap)
        }
    }
}
