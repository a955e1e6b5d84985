import BlockCore
import BlockGraph
import QMP

/// An image and the images below it, each opened by itself, so that any of them can be written.
struct ImageChain {
    /// One image of the chain.
    struct Layer {
        let node: BlockNode
        let info: ImageInfo
    }

    /// The top image first.
    let layers: [Layer]

    var top: BlockNode { layers[0].node }

    /// Opens a chain. The nodes are held as "command" until the end of the session.
    ///
    /// - Parameter isWritable: whether the layer at an index, 0 for the top, is opened for writing; it is
    ///   told how many there are.
    static func open(
        _ source: ImageSource, in session: ToolSession,
        isWritable: ([ImageInfo]) throws(BlockError) -> Set<Int>
    ) async throws(BlockError) -> ImageChain {
        var plain = source
        plain.isWritable = false
        plain.foundRaw = nil
        let infos = try await ImageInfo.gather(plain, chain: true, in: session)
        let writable = try isWritable(infos)
        var layers: [Layer] = []
        var below: BlockNode?
        for (index, info) in infos.enumerated().reversed() {
            var layer = source
            if index > 0 {
                layer = ImageSource(path(of: index, infos), format: info.format)
                layer.cache = source.cache
                layer.sharesAll = source.sharesAll
            }
            layer.isWritable = writable.contains(index)
            layer.discards = layer.isWritable
            let node = try await session.openLayer(layer, above: below)
            layers.insert(Layer(node: node, info: info), at: 0)
            below = node
        }
        return ImageChain(layers: layers)
    }

    /// How the image above names it, seen from where the command runs.
    private static func path(of index: Int, _ infos: [ImageInfo]) -> String {
        infos[index - 1].backingPath ?? infos[index].filename
    }

    /// The layer that a user means by `name`: as the image above it has the name, or by its path.
    func index(named name: String) -> Int? {
        layers.indices.dropFirst().first { index in
            let above = layers[index - 1].info
            return above.backingName == name || above.backingPath == name
                || layers[index].info.filename == name
        }
    }
}

extension ToolSession {
    /// Opens one image of a chain over the one below it.
    fileprivate func openLayer(
        _ source: ImageSource, above below: BlockNode?
    ) async throws(BlockError) -> BlockNode {
        guard case .object(var options) = try await options(for: source) else {
            throw BlockError(.invalidArgument, "an image's options must be an object")
        }
        if case .string(let name) = options["driver"],
            try Self.registry.driver(named: name).supportsBacking
        {
            options["backing"] = below.map { .string($0.name) } ?? .null
        }
        let node = try await graph.open(.object(options))
        node.hold("command")
        node.release("opening")
        return node
    }

    /// Ends the holds of a chain; its images are closed with their last user.
    func close(_ chain: ImageChain) async throws(BlockError) {
        for layer in chain.layers { layer.node.release("command") }
        try await graph.collect()
    }
}
