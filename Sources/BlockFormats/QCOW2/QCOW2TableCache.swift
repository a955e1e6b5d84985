import BlockCore
import BlockGraph
import BlockIO

/// Slices of L2 tables or of refcount blocks in memory, by slice number.
///
/// Invariants:
/// 1. A slice that is dirty, pinned or being written stays: its memory is the truth.
/// 2. A slice is in `dirty` exactly when `isDirty` is set.
/// 3. One load per slice is in flight; who else wants the slice waits for it.
///
/// The cache does not know the order in which tables reach the disk: whoever owns it does.
final class QCOW2TableCache {
    final class Slice: @unchecked Sendable {
        let key: Int
        /// Where it is in the file.
        var host: Int
        let memory: IOSlice
        fileprivate(set) var isDirty = false
        var isWriting = false
        var pinCount = 0
        fileprivate var isReferenced = true

        init(key: Int, host: Int, memory: IOSlice) {
            self.key = key
            self.host = host
            self.memory = memory
        }

        @inline(__always) var bytes: UnsafeMutableRawBufferPointer { memory.bytes }

        @inline(__always)
        subscript(index: Int) -> UInt64 {
            get {
                precondition(index >= 0 && (index + 1) << 3 <= memory.count)
                return (memory.buffer.base + memory.offset).load(
                    fromByteOffset: index << 3, as: UInt64.self
                ).bigEndian
            }
            set {
                precondition(index >= 0 && (index + 1) << 3 <= memory.count)
                (memory.buffer.base + memory.offset).storeBytes(
                    of: newValue.bigEndian, toByteOffset: index << 3, as: UInt64.self)
            }
        }
    }

    static let frontCount = 64

    let sliceBytes: Int
    let capacity: Int
    private let file: Edge
    private let loadEvent: DebugEvent
    private var slices: [Int: Slice] = [:]
    /// All of them, in the order that the clock hand visits.
    private var ring: [Slice] = []
    private var hand = 0
    /// The last slice found for each key modulo its length: saves the hash.
    private var front = [Slice?](repeating: nil, count: QCOW2TableCache.frontCount)
    private var loading: [Int: WaitQueue] = [:]
    private(set) var dirty: [Slice] = []

    /// - Parameter loads: what a node for tests below is told before a slice is read.
    init(file: Edge, sliceBytes: Int, bytesMax: Int, loads: DebugEvent = .l2Load) {
        self.file = file
        loadEvent = loads
        self.sliceBytes = sliceBytes
        capacity = max(2, bytesMax / sliceBytes)
    }

    var count: Int { ring.count }

    @inline(__always)
    func lookup(_ key: Int) -> Slice? {
        if let slice = front[key & (Self.frontCount - 1)], slice.key == key {
            return slice
        }
        return lookupBehind(key)
    }

    private func lookupBehind(_ key: Int) -> Slice? {
        guard let slice = slices[key] else { return nil }
        slice.isReferenced = true
        front[key & (Self.frontCount - 1)] = slice
        return slice
    }

    func markDirty(_ slice: Slice) {
        guard !slice.isDirty else { return }
        slice.isDirty = true
        dirty.append(slice)
    }

    /// What all dirty slices are to have in the file.
    func copyDirty() throws(BlockError) -> [(host: Int, memory: IOSlice)] {
        var copies: [(host: Int, memory: IOSlice)] = []
        for slice in dirty { copies.append((slice.host, try copy(slice))) }
        return copies
    }

    func copy(_ slice: Slice) throws(BlockError) -> IOSlice {
        let copy = try IOBuffer(count: sliceBytes).prefix(sliceBytes)
        copy.bytes.copyMemory(from: UnsafeRawBufferPointer(slice.bytes))
        return copy
    }

    /// All dirty slices, which are clean from now on.
    func takeDirty() -> [Slice] {
        let taken = dirty
        dirty = []
        for slice in taken { slice.isDirty = false }
        return taken
    }

    /// The slice, from memory or from `host` in the file.
    ///
    /// - Parameter makeClean: called when every slice is dirty: writes some out.
    func load(
        _ key: Int, host: Int, makeClean: () async throws(BlockError) -> Void
    ) async throws(BlockError) -> Slice {
        while let queue = loading[key] { await queue.wait() }
        if let slice = lookup(key) { return slice }
        let queue = WaitQueue()
        loading[key] = queue
        defer {
            loading[key] = nil
            queue.wakeAll()
        }
        if ring.count >= capacity, !evict() {
            try await makeClean()
            _ = evict()
        }
        let memory = try IOBuffer(count: sliceBytes).prefix(sliceBytes)
        await file.reached(loadEvent)
        try await Self.read(file, host, memory)
        let slice = Slice(key: key, host: host, memory: memory)
        slices[key] = slice
        ring.append(slice)
        front[key & (Self.frontCount - 1)] = slice
        return slice
    }

    private static func read(
        _ file: Edge, _ host: Int, _ memory: IOSlice
    ) async throws(BlockError) {
        let vector = IOVector(memory)
        let there = max(0, min(memory.count, file.size - host))
        // A table that the file ends in reads as zeroes: nothing is allocated there.
        if there < memory.count { vector.zero(there, memory.count - there) }
        if there > 0 { try await file.read(host, into: vector.slice(0, there)) }
    }

    /// Drops a clean slice that was not used lately.
    private func evict() -> Bool {
        var steps = 2 * ring.count
        while steps > 0 {
            steps -= 1
            if hand >= ring.count { hand = 0 }
            let slice = ring[hand]
            if slice.isDirty || slice.isWriting || slice.pinCount > 0 {
                hand += 1
            } else if slice.isReferenced {
                slice.isReferenced = false
                // Else the front would hide that it is in use.
                forgetFront(slice)
                hand += 1
            } else {
                remove(at: hand)
                return true
            }
        }
        return false
    }

    private func remove(at index: Int) {
        let slice = ring[index]
        ring.swapAt(index, ring.count - 1)
        ring.removeLast()
        slices[slice.key] = nil
        forgetFront(slice)
    }

    private func forgetFront(_ slice: Slice) {
        let index = slice.key & (Self.frontCount - 1)
        if front[index] === slice { front[index] = nil }
    }

    /// Drops what is clean and was not used since the last call.
    func dropUnused() {
        var index = 0
        while index < ring.count {
            let slice = ring[index]
            if slice.isDirty || slice.isWriting || slice.pinCount > 0 {
                index += 1
            } else if slice.isReferenced {
                slice.isReferenced = false
                forgetFront(slice)
                index += 1
            } else {
                remove(at: index)
            }
        }
    }

    /// The slices that are in memory and whose keys are in `keys`.
    func cached(in keys: Range<Int>) -> [Slice] {
        ring.filter { keys.contains($0.key) }
    }

    /// Forgets everything. Nothing is dirty or in use.
    func removeAll() {
        slices = [:]
        ring = []
        dirty = []
        front = [Slice?](repeating: nil, count: Self.frontCount)
        hand = 0
    }

    /// Writes memory to places in the file, neighbours in one request.
    static func write(
        _ pieces: [(host: Int, memory: IOSlice)], to file: Edge
    ) async throws(BlockError) {
        let sorted = pieces.sorted { $0.host < $1.host }
        var index = 0
        while index < sorted.count {
            let start = sorted[index].host
            var vector = IOVector(sorted[index].memory)
            index += 1
            while index < sorted.count, sorted[index].host == start + vector.count,
                vector.segmentCount < 256
            {
                vector.append(sorted[index].memory)
                index += 1
            }
            try await file.write(start, from: vector)
        }
    }
}
