import BlockCore
import BlockGraph
import BlockIO
import QMP

/// The images that a walk down a chain has met and that have something below them: each comes once.
struct ImagesAbove {
    /// What an image is told from others by.
    private enum Key: Hashable {
        case file(FileIdentity)
        /// Options may show different parts of one file.
        case name(String)
    }

    private var keys: Set<Key> = []
    private var last: (key: Key, name: String)?

    /// - Throws: when the image was there before, or the chain is too long.
    mutating func add(_ image: ImageSource) throws(BlockError) {
        let key = Self.key(of: image)
        guard keys.insert(key).inserted else {
            throw .backingLoop(
                image.name, namedBy: last?.name ?? image.name, isItself: last?.key == key)
        }
        guard keys.count < Limits.graphDepthMax else {
            throw BlockError(
                .exhausted, "the backing chain is longer than \(Limits.graphDepthMax) images")
        }
        last = (key, image.name)
    }

    private static func key(of image: ImageSource) -> Key {
        guard !image.isOptions, case .path(let path) = ImageName.kind(image.name),
            let identity = FileIdentity(ofFileAt: path)
        else { return .name(image.name) }
        return .file(identity)
    }
}

/// An image and the images below it, each opened by itself, so that any of them can be written.
///
/// What lies below an image is what the user's options say (`backing`), or else what the image names.
struct ImageChain {
    /// One image of the chain.
    struct Layer {
        let node: BlockNode
        let image: Found
    }

    /// An image that was looked at, and how to open it again.
    struct Found {
        /// Read-only, with the format that was given, or else found out.
        let source: ImageSource
        let info: ImageInfo
        /// The image above names it; else the user's options do.
        let isNamedAbove: Bool
    }

    /// The top image first.
    let layers: [Layer]

    var top: BlockNode { layers[0].node }
    var images: [Found] { layers.map(\.image) }

    /// Opens a chain. The nodes are held as "command" until the end of the session.
    ///
    /// - Parameter isWritable: which layers are opened for writing, by index, 0 for the top; it is
    ///   told what there is.
    static func open(
        _ source: ImageSource, in session: ToolSession,
        isWritable: ([Found]) throws(BlockError) -> Set<Int>
    ) async throws(BlockError) -> ImageChain {
        let found = try await find(source, in: session)
        let writable = try isWritable(found)
        var layers: [Layer] = []
        var below: BlockNode?
        for (index, image) in found.enumerated().reversed() {
            var layer = image.source
            if index == 0 { layer.foundRaw = source.foundRaw }
            layer.isWritable = writable.contains(index)
            layer.discards = layer.isWritable
            let node = try await session.openLayer(layer, above: below)
            layers.insert(Layer(node: node, image: image), at: 0)
            below = node
        }
        return ImageChain(layers: layers)
    }

    // MARK: Finding

    private static func find(
        _ source: ImageSource, in session: ToolSession
    ) async throws(BlockError) -> [Found] {
        var result: [Found] = []
        var above = ImagesAbove()
        var next: (source: ImageSource, isNamed: Bool)? = (source, true)
        while let current = next {
            var layer = current.source
            layer.isWritable = false
            layer.foundRaw = nil
            layer.withoutBacking = true
            let given = try layer.givenOptions()
            let info = try await ImageInfo.one(
                layer, given == nil ? layer.name : nil, in: session)
            if layer.format == nil, given?["driver"] == nil { layer.probedFormat = info.format }
            layer.withoutBacking = false
            result.append(Found(source: layer, info: info, isNamedAbove: current.isNamed))
            next = try below(layer, given, info)
            if next != nil { try above.add(layer) }
        }
        return result
    }

    /// What lies below an image.
    private static func below(
        _ layer: ImageSource, _ given: JSONObject?, _ info: ImageInfo
    ) throws(BlockError) -> (source: ImageSource, isNamed: Bool)? {
        var below: ImageSource
        var isNamed = false
        switch given?["backing"] {
        case .object(let options)?:
            below = ImageSource(JSONValue.object(options).text(), isOptions: true)
        case .null?, .string("")?:
            return nil
        case .some:
            throw BlockError(
                .invalidArgument, "'backing' is no image of this command line's",
                remedy: "give options of it, as in backing.file.filename=…")
        case nil:
            guard !layer.isUntrusted, let path = info.backingPath else { return nil }
            below = ImageSource(path, formatInHeader: info.backingFormat)
            isNamed = true
        }
        below.cache = layer.cache
        below.sharesAll = layer.sharesAll
        below.objects = layer.objects
        below.isUntrusted = layer.isUntrusted
        return (below, isNamed)
    }

    // MARK: Naming

    /// The image below the top that a user means by `name`: what the image above calls it, a path from
    /// that image's folder or from where the command runs.
    static func index(named name: String, in images: [Found]) -> Int? {
        let below = images.indices.dropFirst()
        let called = below.first { index in
            let above = images[index - 1].info
            let isAbove = above.backingName == name || above.backingPath == name
            return isAbove && images[index].isNamedAbove || images[index].info.filename == name
        }
        if let called { return called }
        return below.first { index in
            let above = images[index - 1].info.filename
            return images[index].isFile(at: ImageName.resolve(name, besides: above))
        } ?? below.first { images[$0].isFile(at: name) }
    }

    /// The layer below the top that is the image at `path` in `format`, to the last byte.
    func index(ofImageAt path: String, format: String?) -> Int? {
        images.indices.dropFirst().first { index in
            let image = images[index]
            // Options may show a part of the file only, or put it above other images.
            return image.info.format == format && image.isFile(at: path) && image.isWhole
        }
    }
}

extension ImageChain.Found {
    fileprivate func isFile(at path: String) -> Bool {
        guard case .path(let path) = ImageName.kind(path),
            let identity = FileIdentity(ofFileAt: path)
        else { return false }
        return identity == FileIdentity(ofFileAt: info.filename)
    }

    /// Opened by its name alone.
    fileprivate var isWhole: Bool {
        if source.isOptions { return false }
        if case .path = ImageName.kind(source.name) { return true }
        return false
    }
}

extension ToolSession {
    /// Opens one image of a chain over the one below it.
    fileprivate func openLayer(
        _ source: ImageSource, above below: BlockNode?
    ) async throws(BlockError) -> BlockNode {
        var alone = source
        alone.withoutBacking = true
        guard case .object(var options) = try await options(for: alone) else {
            throw BlockError(.invalidArgument, "an image's options must be an object")
        }
        if case .string(let name) = options["driver"],
            try Self.registry.driver(named: name).supportsBacking
        {
            options["backing"] = below.map { .string($0.name) } ?? .null
        }
        let node = try await graph.open(.object(options), inheriting: source.inherited)
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
