import BlockCore
import BlockGraph

/// The L1 tables of an image: the live disk's first, then the snapshots' in the order of their table.
///
/// They are read a part at a time: many snapshots may have large tables, and a hostile image many that lie
/// at the same place.
struct QCOW2Maps {
    struct Map: Equatable {
        /// In the file.
        var offset: Int
        var entryCount: Int
    }

    /// Memory for the parts of all tables that are looked at together.
    static let windowBytesMax = 16 << 20

    let maps: [Map]

    init(of driver: QCOW2Driver) {
        let header = driver.image.header
        maps =
            [Map(offset: header.l1Offset, entryCount: header.l1EntryCount)]
            + driver.snapshots.map { Map(offset: $0.l1Offset, entryCount: $0.l1EntryCount) }
    }

    /// L1 indices, in parts.
    var windows: [Range<Int>] {
        let end = maps.map(\.entryCount).max() ?? 0
        let step = max(1, min(4096, Self.windowBytesMax / 8 / maps.count))
        return stride(from: 0, to: end, by: step).map { $0..<min($0 + step, end) }
    }

    /// What the tables have of `window`; shorter ones have less.
    func entries(_ window: Range<Int>, in file: Edge) async throws(BlockError) -> [[UInt64]] {
        var result: [[UInt64]] = []
        result.reserveCapacity(maps.count)
        for map in maps {
            let count = max(0, min(window.upperBound, map.entryCount) - window.lowerBound)
            result.append(
                try await QCOW2Driver.readTable(
                    file, map.offset + window.lowerBound * 8, count))
        }
        return result
    }
}

/// L2 tables that map the same part of the disk, one part of each in memory.
///
/// Confined to the graph's thread.
final class QCOW2TablePart: @unchecked Sendable {
    /// Memory for the parts of all tables that are looked at together.
    static let bytesMax = 32 << 20
    static let partBytesMax = 64 << 10

    /// Bytes of each of `tableCount` tables that are in memory at once: a power of two, and a divisor of
    /// the cluster size.
    static func bytes(_ tableCount: Int, _ geometry: QCOW2.Geometry) -> Int {
        var bytes = min(geometry.clusterSize, partBytesMax)
        while bytes > 512, bytes * tableCount > bytesMax { bytes /= 2 }
        return bytes
    }

    private let geometry: QCOW2.Geometry
    private let memory: IOBuffer
    let partBytes: Int
    var entryCount: Int { partBytes >> geometry.l2EntryShift }

    /// Memory for `tableCount` parts; its content is undefined.
    init(_ tableCount: Int, _ partBytes: Int, _ geometry: QCOW2.Geometry) throws(BlockError) {
        self.partBytes = partBytes
        self.geometry = geometry
        memory = try IOBuffer(count: tableCount * partBytes)
    }

    func slice(_ table: Int) -> IOSlice { IOSlice(memory, table * partBytes, partBytes) }

    func clear(_ table: Int) {
        slice(table).bytes.initializeMemory(as: UInt8.self, repeating: 0)
    }

    /// Reads the parts at `start` of the tables at `hosts`; a table at 0 is empty.
    func load(_ hosts: [Int], from start: Int, of driver: QCOW2Driver) async throws(BlockError) {
        let lanes = RequestLanes(on: driver.node.seat)
        for (index, host) in hosts.enumerated() {
            guard host != 0 else {
                clear(index)
                continue
            }
            await lanes.waitForRoom()
            let part = IOVector(slice(index))
            await lanes.start { () throws(BlockError) in
                try await driver.readFile(host + start, into: part)
            }
        }
        try await lanes.finish()
    }

    subscript(table: Int, index: Int) -> QCOW2.L2Entry {
        get {
            let bytes = UnsafeRawBufferPointer(slice(table).bytes)
            let place = index << geometry.l2EntryShift
            return QCOW2.L2Entry(
                rawValue: bytes.bigEndian(at: place),
                bitmap: geometry.hasSubclusters ? bytes.bigEndian(at: place + 8) : 0)
        }
        set {
            let bytes = slice(table).bytes
            let place = index << geometry.l2EntryShift
            bytes.storeBigEndian(newValue.rawValue, at: place)
            if geometry.hasSubclusters { bytes.storeBigEndian(newValue.bitmap, at: place + 8) }
        }
    }
}

extension QCOW2Driver {
    /// Where the L2 table of an L1 entry is; 0 where there is none.
    ///
    /// - Throws: `corrupt` where there can be none.
    func tableHost(_ raw: UInt64) throws(BlockError) -> Int {
        let host = QCOW2.L1Entry(rawValue: raw).offset
        guard host.isAligned(to: geometry.clusterSize) else {
            throw BlockError(
                .corrupt, "an L2 table is at \(host), which is no cluster",
                remedy: "check and repair the image", node: node.name)
        }
        return host
    }
}
