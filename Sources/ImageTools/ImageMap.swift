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

    /// Walks `range` of the node behind `edge`, calling `found` for each entry as it is known.
    public static func walk(
        _ edge: Edge, _ range: ByteRange, _ found: (Entry) -> Void
    ) async throws(BlockError) {
        let layers = try await layers(edge.node)
        var current: Entry?
        var offset = range.offset
        while offset < range.end {
            // Long questions are put in parts, so that the answer does not need the whole image.
            let asked = ByteRange(offset, min(range.end - offset, 1 << 30))
            let status = try await edge.chainStatus(asked)
            var next = entry(offset, status, layers, top: edge.node)
            if next.isData, next.isZero, !layers[next.depth].asksFile { next.isZero = false }
            if let joined = current.flatMap({ join($0, next) }) {
                current = joined
            } else {
                if let current { found(current) }
                current = next
            }
            offset += status.count
        }
        if let current { found(current) }
    }

    /// One image of a chain.
    private struct Layer {
        /// Bytes.
        var size: Int
        /// Whether the holes of its file are shown as zeroes.
        var asksFile: Bool
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
            result.append(Layer(size: node.size, asksFile: asks))
            next = node.backing?.node
        }
        return result
    }

    private static func entry(
        _ offset: Int, _ status: ChainStatus, _ layers: [Layer], top: BlockNode
    ) -> Entry {
        let lowest = layers.count - 1
        let isPresent = status.depth != nil && status.flags.contains(.allocated)
        let nobody = layers.dropFirst().firstIndex { $0.size <= offset }.map { $0 - 1 }
        let depth = isPresent ? status.depth : nobody
        return Entry(
            start: offset, length: status.count, depth: min(depth ?? lowest, lowest),
            isPresent: isPresent,
            isZero: status.flags.contains(.zero),
            isData: status.flags.contains(.data),
            isCompressed: status.flags.contains(.compressed),
            offset: status.mapping?.offset,
            filename: status.mapping.map { ($0.node ?? top).driver.filename })
    }

    private static func join(_ first: Entry, _ second: Entry) -> Entry? {
        guard first.depth == second.depth, first.isPresent == second.isPresent,
            first.isZero == second.isZero, first.isData == second.isData,
            first.isCompressed == second.isCompressed, first.filename == second.filename
        else { return nil }
        switch (first.offset, second.offset) {
        case (nil, nil): break
        case (let start?, let next?): if start + first.length != next { return nil }
        default: return nil
        }
        var result = first
        result.length += second.length
        return result
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
        text.append("{ \"start\": ")
        text.append(start)
        text.append(", \"length\": ")
        text.append(length)
        text.append(", \"depth\": ")
        text.append(depth)
        text.append(", \"present\": ")
        text.append(isPresent)
        text.append(", \"zero\": ")
        text.append(isZero)
        text.append(", \"data\": ")
        text.append(isData)
        if let offset {
            text.append(", \"offset\": ")
            text.append(offset)
        }
        text.append("}")
    }

    public static let heading = "Offset          Length          Mapped to       File\n"

    /// The line for people; `nil` for what they are not shown: zeroes and what is not there.
    ///
    /// - Throws: where data has no place to point to: it is stored compressed or encrypted.
    public func line() throws(BlockError) -> String? {
        guard isData, !isZero else { return nil }
        guard let offset, let filename else {
            throw BlockError(
                .unsupported, "the bytes at \(start) are stored compressed or encrypted",
                remedy: "use --output=json")
        }
        return [start, length, offset].map(Self.column).joined() + filename + "\n"
    }

    private static func column(_ value: Int) -> String {
        let text = value == 0 ? "0" : "0x" + String(value, radix: 16)
        return text + String(repeating: " ", count: max(0, 16 - text.count))
    }
}
