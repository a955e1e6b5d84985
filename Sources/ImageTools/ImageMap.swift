import BlockCore
import BlockFormats
import BlockGraph
import BlockProtocols

/// `map`: where an image's data lies, over its whole backing chain.
public enum ImageMap {
    /// Bytes that are stored alike and together.
    public struct Entry: Sendable, Equatable {
        public var start: Int
        public var length: Int
        /// How many layers below the top one has it; for what no layer has, the first that has nothing
        /// below it there.
        public var depth: Int
        /// Whether a layer has it.
        public var isPresent: Bool
        public var isZero: Bool
        public var isData: Bool
        public var isCompressed: Bool
        /// Where in `filename` it begins; `nil` where it has no place of its own.
        public var offset: Int?
        public var filename: String?
    }

    /// Where the map of a node ends: past the node's end, where that is within a sector.
    public static func end(of edge: Edge) -> Int { edge.node.sizeInWholeSectors }

    /// Walks `range` of the node behind `edge`, up to ``end(of:)`` at most, calling `found` for each entry as
    /// it is known.
    public static func walk(
        _ edge: Edge, _ range: ByteRange, _ found: (Entry) -> Void
    ) async throws(BlockError) {
        let layers = try await layers(edge.node)
        var names = NodeNames()
        let answer = BlockStatusList()
        var current: Entry?
        func add(_ next: Entry) {
            if current.map({ $0.goesOn(in: next) }) == true {
                current?.length += next.length
            } else {
                if let current { found(current) }
                current = next
            }
        }
        var offset = range.offset
        let end = min(range.end, edge.size)
        while offset < end {
            try await edge.chainStatus(ByteRange(from: offset, to: end), into: answer)
            for var status in answer.runs {
                if !isPresent(status),
                    let rest = sectorRest(ByteRange(offset, status.count), layers, &names)
                {
                    add(rest)
                    offset += rest.length
                    status.count -= rest.length
                    if status.count == 0 { continue }
                }
                var next = entry(offset, status, layers, &names)
                if next.isData, next.isZero, !layers[next.depth].asksFile { next.isZero = false }
                offset += status.count
                add(next)
            }
        }
        if offset < range.end,
            let rest = sectorRest(ByteRange(from: offset, to: range.end), layers, &names)
        {
            add(rest)
        }
        if let current { found(current) }
    }

    /// The start of `range`, as far as it is the rest of the sector within which an image ends: zeroes of
    /// that image's. `nil` where it is none, or the image's bytes have no place of their own.
    private static func sectorRest(
        _ range: ByteRange, _ layers: [Layer], _ names: inout NodeNames
    ) -> Entry? {
        guard let depth = layers.firstIndex(where: { $0.size <= range.offset }),
            let place = layers[depth].place, let end = layers[depth].size.roundedUp(to: 512),
            range.offset < end
        else { return nil }
        return Entry(
            start: range.offset, length: min(range.end, end) - range.offset, depth: depth,
            isPresent: true, isZero: true, isData: false, isCompressed: false,
            offset: place.offset + range.offset, filename: names.name(of: place.node))
    }

    /// The last name that was asked for: a driver may have to put it together.
    private struct NodeNames {
        private var last: (node: BlockNode, name: String)?

        mutating func name(of node: BlockNode) -> String {
            if let last, last.node === node { return last.name }
            let name = node.driver.filename
            last = (node, name)
            return name
        }
    }

    /// One image of a chain.
    private struct Layer {
        /// Bytes.
        var size: Int
        /// Whether the holes of its file are shown as zeroes.
        var asksFile: Bool
        /// Of one that ends within a sector: the storage that has its bytes, and from where on.
        var place: (node: BlockNode, offset: Int)?
    }

    /// The images of the chain, top first.
    ///
    /// In a qcow2 image a cluster is data, whatever holes its file has there, as people know it from
    /// qemu-img; unless the image was preallocated, when the file knows what was written since.
    private static func layers(_ top: BlockNode) async throws(BlockError) -> [Layer] {
        var result: [Layer] = []
        var next: BlockNode? = top
        while var node = next {
            while node.description.kind == .filter, let child = node.filteredChild {
                node = child.node
            }
            var asks = true
            if let image = node.driver as? QCOW2Driver {
                var storage = node
                while let file = storage.file { storage = file.node }
                asks = false
                if let file = storage.driver as? FileDriver {
                    asks = try await image.isPreallocated(storedBytes: file.allocatedBytes())
                }
            }
            var layer = Layer(size: node.size, asksFile: asks)
            if !layer.size.isAligned(to: 512),
                let last = try? node.driver.locate(ByteRange(layer.size - 1, 1))
            {
                layer.place = (last.node, last.range.offset - (layer.size - 1))
            }
            result.append(layer)
            next = node.backing?.node
        }
        return result
    }

    /// Whether a layer has it.
    private static func isPresent(_ status: BlockStatus) -> Bool {
        status.depth != nil && status.flags.contains(.allocated)
    }

    private static func entry(
        _ offset: Int, _ status: BlockStatus, _ layers: [Layer], _ names: inout NodeNames
    ) -> Entry {
        let lowest = layers.count - 1
        let isPresent = isPresent(status)
        var depth = status.depth ?? lowest
        if !isPresent {
            let ended = layers.indices.first { $0 > 0 && layers[$0].size <= offset }
            depth = ended.map { $0 - 1 } ?? lowest
        }
        return Entry(
            start: offset, length: status.count, depth: min(depth, lowest),
            isPresent: isPresent,
            isZero: status.flags.contains(.zero),
            isData: status.flags.contains(.data),
            isCompressed: status.flags.contains(.compressed),
            offset: status.mapping?.offset,
            filename: status.mapping.map { names.name(of: $0.node) })
    }
}

extension ImageMap.Entry {
    /// Whether `next`, which follows it, is stored alike, and behind it.
    fileprivate func goesOn(in next: ImageMap.Entry) -> Bool {
        guard depth == next.depth, isPresent == next.isPresent, isZero == next.isZero,
            isData == next.isData, isCompressed == next.isCompressed, filename == next.filename
        else { return false }
        guard let offset else { return next.offset == nil }
        return next.offset.map { offset + length == $0 } ?? false
    }
}

extension ImageMap.Entry {
    /// What stands in JSON where there is nothing to map.
    public static func nothing(at start: Int) -> ImageMap.Entry {
        ImageMap.Entry(
            start: start, length: 0, depth: 0, isPresent: false, isZero: false, isData: false,
            isCompressed: false)
    }

    /// Appends an element of the JSON array, in the order of keys that scripts know.
    public func appendJSON(to text: inout OutputText) {
        text.append(literal: "{ \"start\": ")
        text.append(start)
        text.append(literal: ", \"length\": ")
        text.append(length)
        text.append(literal: ", \"depth\": ")
        text.append(depth)
        text.append(literal: ", \"present\": ")
        text.append(isPresent)
        text.append(literal: ", \"zero\": ")
        text.append(isZero)
        text.append(literal: ", \"data\": ")
        text.append(isData)
        if let offset {
            text.append(literal: ", \"offset\": ")
            text.append(offset)
        }
        text.append(literal: "}")
    }

    public static let heading = "Offset          Length          Mapped to       File\n"

    /// Appends the line for people; nothing for what they are not shown: zeroes and what is not there.
    ///
    /// - Throws: where data has no place to point to: it is stored compressed or encrypted.
    public func appendLine(to text: inout OutputText) throws(BlockError) {
        guard isData, !isZero else { return }
        guard let offset, let filename else {
            throw BlockError(
                .unsupported, "the bytes at \(start) are stored compressed or encrypted",
                remedy: "use --output=json")
        }
        for value in [start, length, offset] { Self.appendColumn(value, to: &text) }
        text.append(filename)
        text.append(literal: "\n")
    }

    private static func appendColumn(_ value: Int, to text: inout OutputText) {
        let end = text.bytes.count + 16
        if value != 0 { text.append(literal: "0x") }
        text.append(hexadecimal: value)
        while text.bytes.count < end { text.append(literal: " ") }
    }
}
