import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// `compare`: whether two images have the same contents.
///
/// Driven by extents: what both are known to read as zeroes is not read, on neither side; what one is
/// known to read as zeroes is read on the other alone. Several parts are looked at at the same time;
/// the difference that counts is the first one in the images.
public struct ImageCompare: Sendable {
    public enum Result: Sendable, Equatable {
        case identical(sizesDiffer: Bool)
        /// The offset of the first sector that differs.
        case contents(Int, sizesDiffer: Bool)
        /// Of strict comparisons only.
        case sizes
        case allocation(Int)
    }

    /// An error with the exit code that stands for it.
    public struct Failure: Error {
        public let code: Int32
        public let error: BlockError

        /// The images could not be opened.
        public static func opening(_ error: BlockError) -> Failure {
            Failure(code: openingCode, error: error)
        }
        public static let openingCode: Int32 = 2
        static func allocation(_ error: BlockError) -> Failure { Failure(code: 3, error: error) }
        static func reading(_ error: BlockError) -> Failure { Failure(code: 4, error: error) }
    }

    public var first: ImageSource
    public var second: ImageSource
    /// Sizes and allocation count too.
    public var isStrict = false

    public init(_ first: ImageSource, _ second: ImageSource) {
        self.first = first
        self.second = second
    }

    public func run(
        in session: ToolSession, progress: Progress
    ) async throws(Failure) -> Result {
        let users = try await open(in: session)
        let comparison = Comparison(users.0, users.1, isStrict: isStrict, progress)
        let result = try await comparison.run()
        do throws(BlockError) {
            try await session.graph.detach(users.0)
            try await session.graph.detach(users.1)
        } catch {
            throw .reading(error)
        }
        return result
    }

    private func open(in session: ToolSession) async throws(Failure) -> (Edge, Edge) {
        do throws(BlockError) {
            return (
                try await session.use(first, as: "comparison"),
                try await session.use(second, as: "comparison")
            )
        } catch {
            throw .opening(error)
        }
    }
}

extension ImageCompare.Result {
    /// As scripts know them.
    public var text: String {
        let warning = "Warning: Image size mismatch!\n"
        switch self {
        case .identical(let sizesDiffer):
            return (sizesDiffer ? warning : "") + "Images are identical.\n"
        case .contents(let offset, let sizesDiffer):
            return (sizesDiffer ? warning : "") + "Content mismatch at offset \(offset)!\n"
        case .sizes: return "Strict mode: Image size mismatch!\n"
        case .allocation(let offset):
            return "Strict mode: Offset \(offset) block status mismatch!\n"
        }
    }

    /// 0 for identical images, 1 for others.
    public var exitCode: Int32 {
        if case .identical = self { return 0 }
        return 1
    }
}

/// One comparison under way. Confined to the session's thread.
///
/// Both images are walked together: a part is what neither image's extents divide, up to a buffer's length.
/// Past the end of the shorter image there is nothing there, which equals zeroes.
private final class Comparison: @unchecked Sendable {
    private struct Part {
        let index: Int
        let range: ByteRange
        /// What has to be read of either image; what is not is zeroes.
        let readsFirst: Bool
        let readsSecond: Bool
        /// Where in a file the bytes are, if that is known of all that has to be read.
        let places: [FilePlace]?
    }

    private static let partBytesMax = 2 << 20
    /// Two pieces of a part, one of either image, stay in a processor's own cache between being read and
    /// being compared.
    private static let pieceBytes = 128 << 10
    private static let workerCount = 8
    private static let sector = 512

    private let images: (Edge, Edge)
    private let isStrict: Bool
    private let progress: Progress
    private let pieceLength: Int
    /// Whether an image's files may be read past its nodes.
    private let isPlain: (Bool, Bool)
    private let common: Int
    private let end: Int
    private var offset = 0
    private var index = 0
    /// Up to here the images are equal.
    private var compared = 0
    /// Where parts end that are equal, after one that is not finished yet; by index.
    private var ends: [Int: Int] = [:]
    private var nextFinished = 0
    private var known: (ImageSideStatus?, ImageSideStatus?) = (nil, nil)
    private let walks: (StatusWalk, StatusWalk)
    /// One worker walks at a time.
    private let walk = WalkLock()

    /// The difference nearest to the beginning; parts after it do not matter any more.
    private var found: (index: Int, result: ImageCompare.Result)?
    private var failure: (index: Int, failure: ImageCompare.Failure)?

    init(_ first: Edge, _ second: Edge, isStrict: Bool, _ progress: Progress) {
        images = (first, second)
        walks = (StatusWalk(first), StatusWalk(second))
        self.isStrict = isStrict
        self.progress = progress
        let unit = max(first.node.limits.allocationUnit, second.node.limits.allocationUnit)
        // Of a cluster that is longer: a compressed one is unpacked once then.
        pieceLength = min(max(Self.pieceBytes, unit), Self.partBytesMax)
        isPlain = (Self.isPlain(first.node), Self.isPlain(second.node))
        let sizes = (first.node.sizeInWholeSectors, second.node.sizeInWholeSectors)
        common = min(sizes.0, sizes.1)
        end = max(sizes.0, sizes.1)
    }

    func run() async throws(ImageCompare.Failure) -> ImageCompare.Result {
        if isStrict, common != end { return .sizes }
        progress.begin(end)
        do throws(BlockError) {
            try await Workers.run(Self.workerCount, on: images.0.node.thread) {
                () async throws(BlockError) in
                guard let part = await self.next() else { return false }
                if await self.isEqual(part) { self.finished(part) }
                return true
            }
        } catch {
            throw .reading(error)
        }
        // What comes first in the images is what a comparison byte by byte would have met.
        if let failure, failure.index < found?.index ?? .max { throw failure.failure }
        if found == nil { progress.advance(end - compared) }
        return found?.result ?? .identical(sizesDiffer: common != end)
    }

    /// Progress goes as far as all is known to be equal, and so never past a difference.
    private func finished(_ part: Part) {
        ends[part.index] = part.range.end
        while let end = ends.removeValue(forKey: nextFinished) {
            nextFinished += 1
            progress.advance(end - compared)
            compared = end
        }
    }

    // MARK: Walking

    private func next() async -> Part? {
        await walk.lock()
        defer { walk.unlock() }
        while offset < end, found == nil, failure == nil {
            let start = offset
            guard let (first, second) = await statuses(at: start) else { return nil }
            let stop = min(first.end, second.end)
            if isStrict, first.storage != second.storage {
                note(.allocation(start), index)
                return nil
            }
            if first.isZero, second.isZero {
                offset = stop
                continue
            }
            let limit = start < common ? common : end
            offset = min(stop, start + Self.partBytesMax, limit)
            index += 1
            return Part(
                index: index - 1, range: ByteRange(from: start, to: offset),
                readsFirst: !first.isZero, readsSecond: !second.isZero,
                places: Self.places(of: [first, second].filter { !$0.isZero }, at: start))
        }
        return nil
    }

    private func statuses(at offset: Int) async -> (ImageSideStatus, ImageSideStatus)? {
        do throws(BlockError) {
            let first = try await status(of: images.0, walks.0, isPlain.0, at: offset, known.0)
            known.0 = first
            let second = try await status(of: images.1, walks.1, isPlain.1, at: offset, known.1)
            known.1 = second
            return (first, second)
        } catch {
            note(.allocation(error), index)
            return nil
        }
    }

    private func status(
        of image: Edge, _ walk: StatusWalk, _ isPlain: Bool, at offset: Int,
        _ known: ImageSideStatus?
    ) async throws(BlockError) -> ImageSideStatus {
        if let known, offset < known.end { return known }
        guard offset < image.size else {
            return ImageSideStatus(
                isZero: true, storage: .init(), start: offset, end: end, place: nil)
        }
        let found = try await walk.run(at: offset, limit: image.size)
        var storage = ImageSideStatus.Storage()
        storage.flags = found.flags.intersection([.data, .zero, .allocated, .compressed])
        if found.depth == nil { storage.flags.remove(.allocated) }
        storage.hasPlace = found.mapping != nil
        // An extent that ends with its image is another one than an extent that something follows.
        storage.endsImage = offset + found.count == image.node.sizeInWholeSectors
        var place: FilePlace?
        if isPlain, let mapping = found.mapping,
            let reader = (mapping.node.driver as? FileDriver)?.reader
        {
            place = FilePlace(reader: reader, offset: mapping.offset)
        }
        return ImageSideStatus(
            isZero: found.flags.contains(.zero), storage: storage, start: offset,
            end: offset + found.count, place: place)
    }

    /// Whether there is nothing between the image's formats and their files that reads have to pass.
    private static func isPlain(_ node: BlockNode) -> Bool {
        var rest = [node]
        while let next = rest.popLast() {
            switch next.description.kind {
            case .storage, .format: rest += next.children.map(\.node)
            case .filter, .access: return false
            }
        }
        return true
    }

    private static func places(of sides: [ImageSideStatus], at offset: Int) -> [FilePlace]? {
        var places: [FilePlace] = []
        for side in sides {
            guard let place = side.place else { return nil }
            places.append(
                FilePlace(reader: place.reader, offset: place.offset + offset - side.start))
        }
        return places
    }

    // MARK: Looking

    /// Notes what differs in a part.
    private func isEqual(_ part: Part) async -> Bool {
        if let places = part.places, await areEqual(places, part.range.count) { return true }
        var offset = part.range.offset
        while offset < part.range.end {
            let piece = ByteRange(offset, min(pieceLength, part.range.end - offset))
            do throws(BlockError) {
                let first = part.readsFirst ? try await read(images.0, piece) : nil
                let second = part.readsSecond ? try await read(images.1, piece) : nil
                if let difference = Self.difference(first, second) {
                    note(
                        .contents(
                            piece.offset + difference,
                            sizesDiffer: part.range.offset >= common), part.index)
                    return false
                }
            } catch {
                note(
                    .reading(error.doing("error while reading at offset \(piece.offset)")),
                    part.index)
                return false
            }
            offset = piece.end
        }
        return true
    }

    /// Whether files hold the same bytes at two places, or zeroes at one. A worker thread reads and compares
    /// them piece by piece, so that all processors are at work, each with what its cache holds.
    ///
    /// - Returns: `false` also where it cannot tell: reading through the nodes says what is wrong.
    private func areEqual(_ places: [FilePlace], _ count: Int) async -> Bool {
        await images.0.node.thread.offload { () -> Bool in
            do throws(BlockError) {
                let vectors = try places.map { _ throws(BlockError) in
                    try IOVector(allocating: Self.pieceBytes)
                }
                var done = 0
                while done < count {
                    let length = min(Self.pieceBytes, count - done)
                    let pieces = vectors.map { $0.slice(0, length) }
                    for (place, piece) in zip(places, pieces) {
                        guard place.reader.read(piece, at: place.offset + done) else {
                            return false
                        }
                    }
                    guard let first = pieces.first else { return false }
                    let second = pieces.count > 1 ? pieces[1] : nil
                    if Self.difference(first, second) != nil { return false }
                    done += length
                }
                return true
            } catch { return false }
        }
    }

    private func read(_ image: Edge, _ range: ByteRange) async throws(BlockError) -> IOVector {
        let vector = try IOVector(allocating: range.count)
        try await image.read(range.offset, into: vector)
        return vector
    }

    /// Where the first sector begins that differs; `nil` for none.
    private static func difference(_ first: IOVector?, _ second: IOVector?) -> Int? {
        guard let one = (first ?? second)?.single?.bytes else { return nil }
        let bytes = UnsafeRawBufferPointer(one)
        if first == nil || second == nil {
            // The other side is zeroes.
            let run = ZeroDetection.run(in: bytes, from: 0, unit: sector)
            return !run.isZero ? 0 : run.end < bytes.count ? run.end : nil
        }
        guard let other = second?.single?.bytes, let a = one.baseAddress, let b = other.baseAddress,
            memcmp(a, b, bytes.count) != 0
        else { return nil }
        var offset = 0
        while offset < bytes.count {
            let count = min(sector, bytes.count - offset)
            if memcmp(a + offset, b + offset, count) != 0 { return offset }
            offset += count
        }
        return nil
    }

    private func note(_ result: ImageCompare.Result, _ index: Int) {
        if index < found?.index ?? .max { found = (index, result) }
    }

    private func note(_ failure: ImageCompare.Failure, _ index: Int) {
        if index < self.failure?.index ?? .max { self.failure = (index, failure) }
    }
}

/// What is known of one image from some offset up to `end`.
private struct ImageSideStatus {
    struct Storage: Equatable {
        var flags: ExtentFlags = []
        var hasPlace = false
        var endsImage = false
    }
    let isZero: Bool
    let storage: Storage
    let start: Int
    let end: Int
    /// Of `start`.
    let place: FilePlace?
}

/// Where a file holds some bytes.
private struct FilePlace: Sendable {
    let reader: FileReader
    let offset: Int
}
