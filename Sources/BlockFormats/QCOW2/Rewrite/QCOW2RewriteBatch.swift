import BlockCore
import BlockGraph

/// Clusters that are in memory together on their way to a new file.
///
/// Confined to the graph's thread, but for what worker threads are handed.
final class QCOW2RewriteBatch: @unchecked Sendable {
    struct Write {
        var offset: Int
        var vector: IOVector
    }

    private let items: [QCOW2Rewrite.Item]
    private let rewrite: QCOW2Rewrite
    private var source: QCOW2Driver { rewrite.source }
    private let geometry: QCOW2.Geometry
    /// A cluster for each item, as it is in the file; of compressed ones what the stream takes.
    private let memory: IOBuffer
    /// Compressed clusters that the file has.
    private var streams: QCOW2StreamBatch?
    private var streamItems: [Int] = []
    /// Compressed now, by item.
    private var compressed: [Int: IOSlice] = [:]
    private var isZero: [Bool]
    private var outcomes: [QCOW2Rewrite.Item.Outcome] = []

    init(
        _ items: ArraySlice<QCOW2Rewrite.Item>, _ rewrite: QCOW2Rewrite
    ) throws(BlockError) {
        self.items = Array(items)
        self.rewrite = rewrite
        geometry = rewrite.geometry
        memory = try IOBuffer(count: items.count << geometry.clusterBits)
        isZero = [Bool](repeating: false, count: items.count)
    }

    private func cluster(_ item: Int) -> IOSlice {
        IOSlice(memory, item << geometry.clusterBits, geometry.clusterSize)
    }

    /// The clusters of several items. Never a part of its caller: Swift 6.3 cannot optimise the loop in
    /// ``startReads(_:)`` with it, and ends.
    @inline(never)
    private func vector(_ items: Range<Int>) -> IOVector {
        IOVector(
            IOSlice(
                memory, items.lowerBound << geometry.clusterBits,
                items.count << geometry.clusterBits))
    }

    // MARK: Read

    func read() async throws(BlockError) {
        let lanes = RequestLanes(on: source.node.seat)
        do throws(BlockError) {
            try await startReads(lanes)
        } catch {
            try? await lanes.finish()
            throw error
        }
        try await lanes.finish()
        rewrite.progress(items.count << geometry.clusterBits)
    }

    private func startReads(_ lanes: RequestLanes) async throws(BlockError) {
        let source = source
        var index = 0
        var wanted: [QCOW2.CompressedDescriptor] = []
        while index < items.count {
            if items[index].isCompressed {
                wanted.append(
                    QCOW2.CompressedDescriptor(
                        items[index].old, clusterBits: geometry.clusterBits))
                streamItems.append(index)
                index += 1
                continue
            }
            let first = index
            let host = items[index].old.offset
            repeat { index += 1 } while isNext(index, after: first)
            let vector = vector(first..<index)
            await lanes.waitForRoom()
            await lanes.start { () throws(BlockError) in
                try await source.readStored(host, into: vector)
            }
        }
        guard !wanted.isEmpty else { return }
        let streams = try QCOW2StreamBatch(wanted, source)
        self.streams = streams
        try await streams.read(lanes)
    }

    /// Whether an item follows those from `first` on in the file, and goes into one request with them.
    private func isNext(_ index: Int, after first: Int) -> Bool {
        let count = index - first
        return index < items.count && !items[index].isCompressed
            && (count + 1) << geometry.clusterBits <= QCOW2Rewrite.requestBytesMax
            && items[index].old.offset == items[first].old.offset + count << geometry.clusterBits
    }

    // MARK: Transform

    /// Finds zeroes, and compresses where that is wanted.
    func transform() async throws(BlockError) {
        for index in items.indices where !items[index].isCompressed {
            // Without its key an encrypted image is copied as it is.
            guard try await decrypt(index) else { continue }
            hideSubclusters(index)
            isZero[index] =
                ZeroDetection.isZero(UnsafeRawBufferPointer(cluster(index).bytes))
                && hasWordForZeroes
        }
        try await streams?.decompress()
        if let streams {
            for (number, index) in streamItems.enumerated() {
                isZero[index] = streams.isZero(number) && hasWordForZeroes
            }
        }
        if rewrite.compresses { try await compress() }
    }

    /// Version 2 can say only that a cluster is not there.
    private var hasWordForZeroes: Bool { source.hasZeroFlag || rewrite.leavesZeroesOut }

    /// - Returns: `false` where there is no key for it.
    private func decrypt(_ index: Int) async throws(BlockError) -> Bool {
        guard let encryption = source.encryption else { return true }
        guard let cipher = encryption.cipher else { return false }
        let item = items[index]
        try await cipher.decrypt(
            IOVector(cluster(index)),
            at: encryption.offset(host: item.old.offset, guest: item.guest))
        return true
    }

    /// What no entry shows is anything: it goes.
    private func hideSubclusters(_ index: Int) {
        guard geometry.hasSubclusters else { return }
        for sub in 0..<32 where items[index].shown & (1 << UInt64(sub)) == 0 {
            cluster(index).slice(sub << geometry.unitBits, 1 << geometry.unitBits).bytes
                .initializeMemory(as: UInt8.self, repeating: 0)
        }
    }

    private func compress() async throws(BlockError) {
        var candidates: [Int] = []
        var data = IOVector()
        for index in items.indices where !items[index].isCompressed && !isZero[index] {
            // A compressed cluster shows all of its subclusters, in every table.
            if geometry.hasSubclusters, !items[index].isWhole { continue }
            candidates.append(index)
            data.append(cluster(index))
        }
        if candidates.isEmpty { return }
        let batch = try QCOW2CompressionBatch(data, clusterSize: geometry.clusterSize)
        let type = source.image.header.compression
        await source.thread.offload(sharing: batch.count) { next in
            guard let compressor = QCOW2Compressor(type) else { return }
            while let index = next() { batch.compress(index, with: compressor) }
        }
        for (number, index) in candidates.enumerated() { compressed[index] = batch[number] }
    }

    // MARK: Place and write

    /// Gives every item its place in the new file.
    func place() throws(BlockError) -> [QCOW2Rewrite.Item.Outcome] {
        for (index, item) in items.enumerated() {
            if isZero[index] {
                outcomes.append(.zero)
            } else if let piece = piece(index) {
                let place = try rewrite.fresh.pack(piece.count, references: item.references)
                outcomes.append(
                    .compressed(
                        QCOW2.L2Entry(compressed: place, clusterBits: geometry.clusterBits)))
            } else {
                outcomes.append(
                    .stored(try rewrite.fresh.take(1, references: item.references)))
            }
        }
        return outcomes
    }

    /// The compressed cluster that is stored for an item.
    private func piece(_ index: Int) -> IOSlice? {
        if let piece = compressed[index] { return piece }
        guard items[index].isCompressed, let number = streamItems.firstIndex(of: index) else {
            return nil
        }
        return streams?.stream(number)
    }

    /// What has to be written where; neighbours in one request.
    func output() async throws(BlockError) -> [Write] {
        var result: [Write] = []
        func add(_ offset: Int, _ vector: IOVector) {
            if let last = result.last, last.offset + last.vector.count == offset,
                last.vector.count + vector.count <= QCOW2Rewrite.requestBytesMax
            {
                result[result.count - 1].vector.append(vector)
            } else {
                result.append(Write(offset: offset, vector: vector))
            }
        }
        for (index, outcome) in outcomes.enumerated() {
            switch outcome {
            case .zero: break
            case .compressed(let entry):
                let place = QCOW2.CompressedDescriptor(entry, clusterBits: geometry.clusterBits)
                if let piece = piece(index) { add(place.offset, IOVector(piece)) }
            case .stored(let host):
                for (start, vector) in try await stored(index, host) { add(host + start, vector) }
            }
        }
        return result
    }

    /// The bytes of a plain cluster for its new place: the subclusters that are shown, encrypted again.
    private func stored(
        _ index: Int, _ host: Int
    ) async throws(BlockError) -> [(start: Int, vector: IOVector)] {
        var whole = IOVector(cluster(index))
        if let encryption = source.encryption, let cipher = encryption.cipher {
            whole = try await cipher.encrypted(
                whole, at: encryption.offset(host: host, guest: items[index].guest))
        }
        guard geometry.hasSubclusters else { return [(0, whole)] }
        return (0..<32).filter { items[index].shown & (1 << UInt64($0)) != 0 }.map { sub in
            let start = sub << geometry.unitBits
            return (start, whole.slice(start, 1 << geometry.unitBits))
        }
    }
}

/// Compressed clusters that are copied as they are: how long each is, only its stream knows.
///
/// Each index is handed to one worker; the results are read when all are done.
final class QCOW2StreamBatch: @unchecked Sendable {
    private let driver: QCOW2Driver
    private let places: [QCOW2.CompressedDescriptor]
    /// What the entries say that there is to read.
    private var sources: [IOSlice] = []
    /// Bytes of each stream; 0 for one that is damaged.
    private let counts: UnsafeMutableBufferPointer<Int>
    private let zeroes: UnsafeMutableBufferPointer<Bool>

    init(
        _ places: [QCOW2.CompressedDescriptor], _ driver: QCOW2Driver
    ) throws(BlockError) {
        self.driver = driver
        self.places = places
        counts = .allocate(capacity: places.count)
        counts.initialize(repeating: 0)
        zeroes = .allocate(capacity: places.count)
        zeroes.initialize(repeating: false)
        for place in places {
            let count = max(1, min(place.byteCount, driver.file.size - place.offset))
            sources.append(try IOBuffer(count: count).prefix(count))
        }
    }

    deinit {
        counts.deallocate()
        zeroes.deallocate()
    }

    func read(_ lanes: RequestLanes) async throws(BlockError) {
        let driver = driver
        for (place, source) in zip(places, sources) {
            await lanes.waitForRoom()
            await lanes.start { () throws(BlockError) in
                try await driver.readFile(place.offset, into: IOVector(source))
            }
        }
    }

    /// Finds out how long the streams are, and what they say.
    ///
    /// - Throws: `corrupt` for one that is damaged.
    func decompress() async throws(BlockError) {
        let size = driver.geometry.clusterSize
        let type = driver.image.header.compression
        await driver.thread.offload(sharing: places.count) { [self] next in
            let target = UnsafeMutableRawBufferPointer.allocate(byteCount: size, alignment: 16)
            defer { target.deallocate() }
            while let index = next() {
                let source = UnsafeRawBufferPointer(sources[index].bytes)
                counts[index] = QCOW2.decompressedCount(source, into: target, type) ?? 0
                zeroes[index] = ZeroDetection.isZero(UnsafeRawBufferPointer(target))
            }
        }
        for (index, place) in places.enumerated()
        where counts[index] == 0 || counts[index] >= size {
            throw BlockError(
                .corrupt, "the compressed cluster at \(place.offset) in the file is damaged",
                remedy: "check and repair the image", node: driver.node.name)
        }
    }

    func isZero(_ index: Int) -> Bool { zeroes[index] }
    func stream(_ index: Int) -> IOSlice { sources[index].slice(0, counts[index]) }
}
