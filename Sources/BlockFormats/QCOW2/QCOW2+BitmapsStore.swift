import BlockCore
import BlockGraph
import BlockIO
import QMP

/// The dirty bitmaps that an open image keeps. Confined to the graph's thread.
///
///     open       directory read; bitmaps that were stored in order are put on the node, with their bits
///                if it is to be written, else these are read when somebody asks for them; those marked
///                in use are inconsistent
///     1st change every entry is marked in use, in place, and that is durable before the change
///     close      bits → tables → new directory written │ refcounts and file flushed │ header names
///                the new directory, flushed │ what the old one took is given back
///
/// Invariants:
/// 1. An entry on disk that is not marked in use has what the bitmap had when the image last changed.
/// 2. While the node awaits its first change, nothing of the node or its persistent bitmaps has
///    changed since the directory was read or stored.
/// 3. The old directory, its tables and bits stay allocated until the header that names the new one
///    is durable: a crash leaks clusters at worst.
final class QCOW2Bitmaps: BitmapStore {
    private let image: QCOW2Image
    private let refcounts: QCOW2Refcounts
    private let geometry: QCOW2.Geometry
    /// As on disk, in their order; also those that are not to be used here.
    private(set) var entries: [QCOW2.BitmapEntry] = []
    /// Why the directory cannot be used: of images that are open read-only.
    private(set) var failure: BlockError?
    /// A driver that takes the place of another one reads the directory when it needs it.
    private var isRead = false
    private var directory: QCOW2.BitmapsExtension?
    private var changing: WaitQueue?
    /// Clusters taken for what nothing on disk names yet: they go back when the change fails.
    private var unnamed: [QCOW2Refcounts.Allocation] = []

    private var node: BlockNode { image.node }

    init(_ image: QCOW2Image, _ refcounts: QCOW2Refcounts) {
        self.image = image
        self.refcounts = refcounts
        geometry = image.geometry
    }

    // MARK: Directory

    /// Reads the directory. An image that is open read-only goes on without bitmaps when it is
    /// damaged.
    ///
    /// - Parameter writable: the image will be written.
    /// - Throws: `corrupt` when it is not what the specification says, and when it cannot be read.
    func readDirectory(writable: Bool) async throws(BlockError) {
        do throws(BlockError) {
            try await readEntries(writable: writable)
            isRead = true
        } catch {
            entries = []
            directory = nil
            guard !writable else {
                throw BlockError(
                    error.code, "its dirty bitmaps cannot be used: \(error.message)",
                    remedy: "repair it, or open it with read-only=on", node: error.node)
            }
            failure = error
            isRead = true
        }
    }

    private func readEntries(writable: Bool) async throws(BlockError) {
        let type = QCOW2.HeaderExtension.bitmaps
        guard image.header.hasBitmaps,
            let found = image.header.extensions.first(where: { $0.type == type })
        else {
            // Some program wrote the image and knew nothing of them: they say nothing any more.
            if writable { forgetDirectory() }
            return
        }
        let place = try QCOW2.BitmapsExtension(
            parsing: found.data, clusterSize: geometry.clusterSize)
        let bytes = try await read(place.directoryOffset, place.directoryBytes)
        entries = try bytes.withUnsafeBytes { memory in
            Self.result { () throws(BlockError) in
                try QCOW2.BitmapEntry.parse(
                    memory, count: place.count, clusterSize: geometry.clusterSize)
            }
        }.get()
        directory = place
        for entry in entries { protect(entry.tableOffset, entry.tableCount * 8, true) }
        protect(place.directoryOffset, place.directoryBytes, true)
    }

    private func forgetDirectory() {
        image.header.extensions.removeAll { $0.type == QCOW2.HeaderExtension.bitmaps }
        image.header.autoclear.remove(.bitmaps)
    }

    /// A typed error does not pass through the closure of `withUnsafeBytes`.
    private static func result<T>(
        _ body: () throws(BlockError) -> T
    ) -> Result<T, BlockError> {
        do throws(BlockError) {
            return .success(try body())
        } catch {
            return .failure(error)
        }
    }

    /// Bytes of the image file.
    ///
    /// - Throws: `corrupt` past its end.
    private func read(_ offset: Int, _ count: Int) async throws(BlockError) -> [UInt8] {
        guard let end = offset.adding(count), end <= image.file.size else {
            throw BlockError(
                .corrupt,
                "\(count) bytes of dirty bitmaps at \(offset) are past the end of the file")
        }
        let vector = try IOVector(allocating: count)
        try await image.file.read(offset, into: vector)
        return vector.array
    }

    /// Whether data may be written over the clusters of a structure.
    private func protect(_ offset: Int, _ bytes: Int, _ isProtected: Bool) {
        // Not of a table that ends past every file.
        guard offset < image.file.size else { return }
        for step in 0..<geometry.clusterCount(for: min(bytes, image.file.size - offset)) {
            let cluster = offset + step << geometry.clusterBits
            if isProtected {
                image.addBitmapTable(at: cluster)
            } else {
                image.removeBitmapTable(at: cluster)
            }
        }
    }

    // MARK: Loading

    /// Puts the bitmaps of the directory on the node, where they are not yet.
    func load() async throws(BlockError) {
        var memory = 0
        for entry in entries {
            guard entry.isUsable, let name = entry.text, node.dirtyBitmap(named: name) == nil else {
                continue
            }
            let bitmap = try await stored(entry, name, &memory)
            bitmap.isPersistent = true
            bitmap.isEnabled = entry.flags.contains(.auto) && !bitmap.isInconsistent
            try node.addDirtyBitmap(bitmap)
        }
        // What cannot be read cannot be marked: should the node be written later, it is refused then.
        node.awaitsFirstChange = failure != nil || Self.areValid(entries)
    }

    /// Whether one of them has to be marked before a change.
    private static func areValid(_ entries: [QCOW2.BitmapEntry]) -> Bool {
        entries.contains { $0.isUsable && !$0.flags.contains(.inUse) }
    }

    /// The bitmap of an entry; without its bits where they say nothing.
    private func stored(
        _ entry: QCOW2.BitmapEntry, _ name: String, _ memory: inout Int
    ) async throws(BlockError) -> DirtyBitmap {
        if !entry.flags.contains(.inUse) {
            do throws(BlockError) {
                let bitmap = try DirtyBitmap(
                    name: name, granularity: entry.granularity, size: node.size)
                let count = bitmap.contents.count
                try checkTable(of: entry, name, bitCount: count)
                if node.isReadOnly {
                    bitmap.loadLater { () throws(BlockError) in
                        try await self.bits(of: entry, name, count: count, besides: 0)
                    }
                } else {
                    let bits = try await bits(of: entry, name, count: count, besides: memory)
                    memory += bits.wordBytes
                    bitmap.contents = bits
                }
                return bitmap
            } catch
                where error.code == .corrupt || error.code == .exhausted || node.isReadOnly
            {
                // Its bits are no bits: the others are good all the same.
            }
        }
        return try DirtyBitmap.inconsistent(
            named: name, granularity: entry.granularity, size: node.size)
    }

    private func checkTable(
        of entry: QCOW2.BitmapEntry, _ name: String, bitCount: Int
    ) throws(BlockError) {
        guard
            entry.tableCount
                == QCOW2.bitmapTableCount(bitCount: bitCount, clusterSize: geometry.clusterSize)
        else {
            throw BlockError(.corrupt, "the table of the dirty bitmap '\(name)' is of another size")
        }
    }

    /// The bits of an entry.
    ///
    /// - Parameter memory: what other bitmaps' bits take, in bytes.
    private func bits(
        of entry: QCOW2.BitmapEntry, _ name: String, count: Int, besides memory: Int
    ) async throws(BlockError) -> ClusterBitmap {
        var bits = ClusterBitmap(count: count)
        let bitsPerCluster = geometry.clusterSize * 8
        // A few clusters of a file must not stand for all of a large bitmap.
        var seen: Set<Int> = []
        for (index, item) in try await readTable(entry).enumerated() {
            guard item.isValid(clusterSize: geometry.clusterSize, fileSize: image.file.size) else {
                throw BlockError(
                    .corrupt, "the table of the dirty bitmap '\(name)' names no cluster")
            }
            if item.offset > 0 {
                guard seen.insert(item.offset).inserted else {
                    throw BlockError(
                        .corrupt, "the table of the dirty bitmap '\(name)' names a cluster twice")
                }
                let bytes = try await read(item.offset, geometry.clusterSize)
                bytes.withUnsafeBytes {
                    bits.formUnion(bytes: $0, at: index * geometry.clusterSize)
                }
                guard memory + bits.wordBytes <= QCOW2.Limit.bitmapMemoryBytesMax else {
                    throw BlockError(.exhausted, "the dirty bitmap '\(name)' is too large to load")
                }
            } else if item.isAllOnes {
                bits.set(index * bitsPerCluster..<min((index + 1) * bitsPerCluster, count))
            }
        }
        return bits
    }

    private func readTable(
        _ entry: QCOW2.BitmapEntry
    ) async throws(BlockError) -> [QCOW2.BitmapTableEntry] {
        let bytes = try await read(entry.tableOffset, entry.tableCount * 8)
        return bytes.withUnsafeBytes { memory in
            (0..<entry.tableCount).map { .init(rawValue: memory.bigEndian(at: $0 * 8)) }
        }
    }

    // MARK: Changes

    /// One change of the directory at a time.
    private func exclusively<T>(
        _ body: () async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        while let changing { await changing.wait() }
        let queue = WaitQueue()
        changing = queue
        defer {
            changing = nil
            queue.wakeAll()
        }
        if !isRead { try await readDirectory(writable: !node.isReadOnly) }
        do throws(BlockError) {
            return try await body()
        } catch {
            let places = unnamed
            unnamed = []
            for place in places {
                try? await refcounts.release(
                    place.offset >> geometry.clusterBits, place.count)
            }
            throw error
        }
    }

    /// Marks all entries in use. In place: each flag changes by itself, and until all are on disk
    /// nothing of what they describe does.
    func beginChanges() async throws(BlockError) {
        try await exclusively { () throws(BlockError) in
            guard node.awaitsFirstChange else { return }
            if let failure { throw failure }
            try await image.writeStaleHeader()
            guard let directory else {
                node.awaitsFirstChange = false
                return
            }
            var marked = entries
            for index in marked.indices where marked[index].isUsable {
                marked[index].flags.insert(.inUse)
            }
            let bytes = QCOW2.BitmapEntry.serialise(marked)
            try await image.checkOverlap(
                directory.directoryOffset, bytes.count, ignoring: .bitmapDirectory,
                "the directory of the bitmaps")
            try await image.file.write(
                directory.directoryOffset, from: try QCOW2Image.vector(bytes))
            try await image.file.flush()
            entries = marked
            node.awaitsFirstChange = false
        }
    }

    func checkStorable(name: String, granularity: Int) throws(BlockError) {
        guard image.header.version == 3 else {
            throw BlockError(
                .unsupported, "qcow2 version 2 has no dirty bitmaps",
                remedy: "make it version 3, or use persistent=off", node: node.name)
        }
        guard !node.isReadOnly else {
            throw BlockError(
                .readOnly, "a dirty bitmap cannot be kept in an image that is open read-only",
                node: node.name)
        }
        if let failure { throw failure }
        guard !entries.contains(where: { !$0.isUsable && $0.name == Array(name.utf8) }) else {
            throw BlockError(
                .alreadyExists, "the image has a bitmap '\(name)' of a kind that is not known",
                node: node.name)
        }
        let new = node.dirtyBitmaps.filter { bitmap in
            bitmap.isPersistent && !entries.contains { $0.text == bitmap.name }
        }
        let lengths =
            entries.map(\.length) + (new.map(\.name) + [name]).map(QCOW2.BitmapEntry.length(named:))
        guard lengths.count <= QCOW2.Limit.bitmapCountMax,
            lengths.reduce(0, +) <= QCOW2.Limit.bitmapDirectoryBytesMax
        else {
            throw BlockError(
                .exhausted, "the image has no room for one more dirty bitmap", node: node.name)
        }
    }

    func removeStored(_ name: String) async throws(BlockError) {
        try await exclusively { () throws(BlockError) in
            guard let index = entries.firstIndex(where: { $0.isUsable && $0.text == name }) else {
                return
            }
            var rest = entries
            let gone = rest.remove(at: index)
            try await publish(rest, dropping: [gone])
        }
    }

    /// Stores all persistent bitmaps of the node as they are. Nothing is written when nothing has
    /// changed.
    func store() async throws(BlockError) {
        try await exclusively { () throws(BlockError) in
            // No disk, no bits, and the format has no table without entries.
            let bitmaps = node.dirtyBitmaps.filter {
                $0.isPersistent && !$0.isInconsistent && node.size > 0
            }
            let isNew = bitmaps.contains { bitmap in
                !entries.contains { $0.text == bitmap.name }
            }
            guard !bitmaps.isEmpty, isNew || !node.awaitsFirstChange else { return }
            var stored = entries
            var replaced: [QCOW2.BitmapEntry] = []
            for bitmap in bitmaps {
                let index = stored.firstIndex { $0.isUsable && $0.text == bitmap.name }
                let old = index.map { stored[$0] }
                let entry = try await write(bitmap, extraData: old?.extraData ?? [])
                if let index, let old {
                    stored[index] = entry
                    replaced.append(old)
                } else {
                    stored.append(entry)
                }
            }
            try await publish(stored, dropping: replaced)
        }
    }
}

extension QCOW2.BitmapEntry {
    /// Bytes that the entry of a new bitmap takes.
    static func length(named name: String) -> Int { (fixedLength + name.utf8.count + 7) & ~7 }
}

// MARK: Writing

extension QCOW2Bitmaps {
    /// What is written of bits at once.
    private static let writeBytesMax = 1 << 20

    /// Writes the bits of a bitmap and their table to new clusters.
    ///
    /// - Returns: the entry that names them; nothing on disk does yet.
    private func write(
        _ bitmap: DirtyBitmap, extraData: [UInt8]
    ) async throws(BlockError) -> QCOW2.BitmapEntry {
        let bits = bitmap.contents
        let clusterSize = geometry.clusterSize
        let count = QCOW2.bitmapTableCount(bitCount: bits.count, clusterSize: clusterSize)
        var table = [UInt64](repeating: 0, count: count)
        var index = 0
        while index < count {
            let kind = kind(of: index, in: bits)
            guard kind == .mixed else {
                if kind == .ones { table[index] = QCOW2.BitmapTableEntry.allOnes.rawValue }
                index += 1
                continue
            }
            var end = index + 1
            while end < count, (end - index) * clusterSize < Self.writeBytesMax,
                self.kind(of: end, in: bits) == .mixed
            {
                end += 1
            }
            let place = try await refcounts.allocate(upTo: end - index)
            unnamed.append(place)
            let vector = try IOVector(allocating: place.count * clusterSize)
            if let memory = vector.single?.bytes {
                bits.copyBytes(from: index * clusterSize, to: memory)
            }
            try await image.file.write(place.offset, from: vector)
            for step in 0..<place.count {
                table[index + step] = UInt64(place.offset + step * clusterSize)
            }
            index += place.count
        }
        let offset = try await writeStructure(QCOW2Refcounts.bigEndian(table[...]))
        var flags: QCOW2.BitmapEntry.Flags = bitmap.isEnabled ? .auto : []
        if !extraData.isEmpty { flags.insert(.extraDataCompatible) }
        return QCOW2.BitmapEntry(
            tableOffset: offset, tableCount: count, flags: flags,
            granularityBits: bitmap.granularity.trailingZeroBitCount, extraData: extraData,
            name: Array(bitmap.name.utf8))
    }

    private enum ClusterKind { case zeroes, ones, mixed }

    /// What the bits of cluster `index` are.
    private func kind(of index: Int, in bits: ClusterBitmap) -> ClusterKind {
        let width = geometry.clusterSize * 8
        let range = index * width..<min((index + 1) * width, bits.count)
        guard bits.firstSet(in: range) != nil else { return .zeroes }
        // Bits past the last one are zero.
        return range.count == width && bits.firstClear(in: range) == nil ? .ones : .mixed
    }

    /// Writes a table or directory to new clusters in a row.
    private func writeStructure(_ bytes: [UInt8]) async throws(BlockError) -> Int {
        let clusters = geometry.clusterCount(for: bytes.count)
        let place = try await refcounts.allocate(exactly: clusters)
        unnamed.append(place)
        let padding = clusters << geometry.clusterBits - bytes.count
        try await image.file.write(
            place.offset,
            from: try QCOW2Image.vector(bytes + [UInt8](repeating: 0, count: padding)))
        return place.offset
    }

    /// Makes `new` the directory, and gives back what `dropped` and the old directory took.
    private func publish(
        _ new: [QCOW2.BitmapEntry], dropping dropped: [QCOW2.BitmapEntry]
    ) async throws(BlockError) {
        let old = directory
        var place: QCOW2.BitmapsExtension?
        if !new.isEmpty {
            let bytes = QCOW2.BitmapEntry.serialise(new)
            place = QCOW2.BitmapsExtension(
                count: new.count, directoryBytes: bytes.count,
                directoryOffset: try await writeStructure(bytes))
            try await refcounts.writeBlocks()
            try await image.file.flush()
        }
        // From here on the disk may name them.
        unnamed = []
        let header = (extensions: image.header.extensions, autoclear: image.header.autoclear)
        forgetDirectory()
        if let place { name(place) }
        do throws(BlockError) {
            try await image.writeHeader()
            try await image.file.flush()
        } catch {
            // Whichever directory the disk names now: all that both name stays allocated.
            image.header.extensions = header.extensions
            image.header.autoclear = header.autoclear
            throw error
        }
        directory = place
        entries = new
        node.awaitsFirstChange = Self.areValid(new)
        for entry in new { protect(entry.tableOffset, entry.tableCount * 8, true) }
        if let place { protect(place.directoryOffset, place.directoryBytes, true) }
        for entry in dropped { try await giveBack(entry) }
        if let old {
            protect(old.directoryOffset, old.directoryBytes, false)
            try await giveBack(old.directoryOffset, old.directoryBytes)
        }
    }

    /// Puts the directory's place into the header.
    private func name(_ place: QCOW2.BitmapsExtension) {
        image.header.extensions.append(
            .init(type: QCOW2.HeaderExtension.bitmaps, data: place.serialised))
        image.header.autoclear.insert(.bitmaps)
        // Names of features are a courtesy: small clusters may have no room for both.
        if (try? image.header.serialised()) == nil {
            image.header.extensions.removeAll { $0.type == QCOW2.HeaderExtension.featureNames }
        }
    }

    private func giveBack(_ entry: QCOW2.BitmapEntry) async throws(BlockError) {
        let clusterSize = geometry.clusterSize
        // A table that makes no sense leaks what it names.
        if let table = try? await readTable(entry) {
            for item in table where item.offset > 0 {
                guard item.isValid(clusterSize: clusterSize, fileSize: image.file.size) else {
                    continue
                }
                try await giveBack(item.offset, clusterSize)
            }
        }
        protect(entry.tableOffset, entry.tableCount * 8, false)
        try await giveBack(entry.tableOffset, entry.tableCount * 8)
    }

    private func giveBack(_ offset: Int, _ bytes: Int) async throws(BlockError) {
        let first = offset >> geometry.clusterBits
        for cluster in first..<(first + geometry.clusterCount(for: bytes)) {
            // What a damaged image counts or uses otherwise is left alone.
            guard try await refcounts.count(of: cluster) == 1,
                image.overlap(cluster << geometry.clusterBits, geometry.clusterSize) == nil
            else { continue }
            try await refcounts.release(cluster, 1)
        }
    }

    // MARK: Information

    /// As image information tells of them; `nil` where there are none.
    func information() async -> JSONValue? {
        // Information is there of images, too, whose bitmaps are not.
        if !isRead { try? await readDirectory(writable: !node.isReadOnly) }
        let usable = entries.filter(\.isUsable)
        if usable.isEmpty { return nil }
        return .array(
            usable.map { entry in
                var flags: [JSONValue] = []
                if entry.flags.contains(.inUse) { flags.append("in-use") }
                if entry.flags.contains(.auto) { flags.append("auto") }
                return [
                    "flags": .array(flags), "name": .string(entry.text ?? ""),
                    "granularity": .integer(entry.granularity),
                ]
            })
    }
}

extension QCOW2Driver {
    public var bitmapStore: (any BitmapStore)? { bitmaps }
}
