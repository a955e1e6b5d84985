import BlockCore
import BlockGraph

/// What a run of bytes is to a copy.
enum CopyKind: Sendable {
    /// Has to be read.
    case data
    /// Reads as zeroes.
    case zero
    /// Lies in layers that are not copied: the target has it already.
    case below
}

/// Images one after the other, seen as one: what is copied. Confined to the session's thread.
///
/// Each image counts up to a whole sector; what it lacks there is zeroes.
final class CopySource: @unchecked Sendable {
    private struct Part {
        let edge: Edge
        let start: Int
        /// Where in the image the part begins.
        let base: Int
        /// Whole sectors.
        let count: Int
        /// Layers of the image, top first, whose data is copied; the rest is `below`.
        let layers: Int
        let hasMoreLayers: Bool
        let walk: StatusWalk
    }

    private let parts: [Part]
    let size: Int

    var edges: [Edge] { parts.map(\.edge) }

    /// - Parameter layers: how many of the top layers are copied; `nil` for all.
    /// - Throws: when all together are too large.
    init(_ edges: [Edge], layers: Int? = nil) throws(BlockError) {
        var parts: [Part] = []
        var start = 0
        for edge in edges {
            guard let count = edge.size.roundedUp(to: 512), let end = start.adding(count),
                end <= Limits.nodeSizeMax
            else {
                throw BlockError(.invalidArgument, "the sources together are too large")
            }
            let all = edge.node.layerCount
            parts.append(
                Part(
                    edge: edge, start: start, base: 0, count: count, layers: layers ?? .max,
                    hasMoreLayers: layers.map { $0 < all } ?? false, walk: StatusWalk(edge)))
            start = end
        }
        self.parts = parts
        size = start
    }

    /// A part of one image: what is copied begins with it.
    init(_ edge: Edge, range: ByteRange) throws(BlockError) {
        guard let count = range.count.roundedUp(to: 512) else {
            throw BlockError(.invalidArgument, "the source is too large")
        }
        parts = [
            Part(
                edge: edge, start: 0, base: range.offset, count: count, layers: .max,
                hasMoreLayers: false, walk: StatusWalk(edge))
        ]
        size = count
    }

    private func part(at offset: Int) -> Part? {
        // A handful: a search would not be faster.
        parts.first { offset >= $0.start && offset < $0.start + $0.count }
    }

    /// What the run of bytes at `range.offset` is; at most all of `range`, at least one byte. One walk goes
    /// over the source, from its beginning to its end.
    func status(_ range: ByteRange) async throws(BlockError) -> (kind: CopyKind, count: Int) {
        guard let part = part(at: range.offset) else { return (.zero, range.count) }
        let start = range.offset - part.start + part.base
        let left = min(range.count, part.count + part.base - start)
        guard start < part.edge.size else { return (.zero, left) }
        let status = try await part.walk.run(
            at: start, limit: start + min(left, part.edge.size - start))
        let depth = status.depth ?? (part.hasMoreLayers ? .max : 0)
        if depth >= part.layers { return (.below, status.count) }
        return (status.flags.contains(.zero) ? .zero : .data, status.count)
    }

    /// The bytes at `offset`, into all of `vector`.
    func read(_ offset: Int, into vector: IOVector) async throws(BlockError) {
        var done = 0
        while done < vector.count {
            guard let part = part(at: offset + done) else {
                vector.zero(done, vector.count - done)
                return
            }
            let start = offset + done - part.start + part.base
            let count = min(vector.count - done, part.count + part.base - start)
            let there = max(0, min(count, part.edge.size - start))
            if there > 0 { try await part.edge.read(start, into: vector.slice(done, there)) }
            if there < count { vector.zero(done + there, count - there) }
            done += count
        }
    }

    /// The image that holds all of `range`, and where in it; `nil` when none does alone.
    func place(of range: ByteRange) -> (edge: Edge, range: ByteRange)? {
        guard let part = part(at: range.offset) else { return nil }
        let start = range.offset - part.start + part.base
        guard range.count <= part.edge.size - start else { return nil }
        return (part.edge, ByteRange(start, range.count))
    }
}

extension BlockNode {
    /// How many images lie above each other from here down; filters are none.
    var layerCount: Int {
        var count = 1
        var layer = self
        while count < Limits.graphDepthMax {
            while layer.description.kind == .filter, let child = layer.filteredChild {
                layer = child.node
            }
            guard let backing = layer.backing else { break }
            layer = backing.node
            count += 1
        }
        return count
    }
}
