import BlockCore
import BlockGraph
import Foundation
import QMP
import Testing

@testable import BlockFormats

#if canImport(Glibc)
import Glibc
#endif

/// Whatever is in an image, every use of it ends, with a value or an error; and a repair makes it
/// one that QEMU calls clean.
@Suite struct QCOW2DamageFuzzTests {
    /// How a whole image is made, by QEMU's tools.
    struct Base: Sendable, CustomTestStringConvertible {
        var options: String
        var snapshots = 0
        var bitmaps = 0
        var isCompressed = false
        var testDescription: String { "\(options), \(snapshots) snapshots, \(bitmaps) bitmaps" }

        static let all: [Base] = [
            Base(options: "cluster_size=65536"),
            Base(options: "cluster_size=512,refcount_bits=1"),
            Base(options: "cluster_size=4096,refcount_bits=64", snapshots: 2, bitmaps: 2),
            Base(options: "cluster_size=4096,compat=0.10", snapshots: 1, isCompressed: true),
            Base(options: "cluster_size=16384,extended_l2=on", snapshots: 1),
            Base(options: "cluster_size=512,refcount_bits=8", snapshots: 2, bitmaps: 1),
        ]
    }

    /// More seeds on demand: `MERINO_SIMULATION_SEEDS=1000`.
    static let seedCount: Int =
        getenv("MERINO_SIMULATION_SEEDS").flatMap { Int(String(cString: $0)) } ?? 6

    static let size = 2 << 20

    private func make(_ base: Base) throws -> (QCOW2TestFolder, [UInt8]) {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", base.options, "a.qcow2", "2M",
        ])
        func write(_ seed: Int) throws {
            var random = QCOW2TestRandom(seed: seed)
            var arguments = ["qemu-io"]
            // First: QEMU writes no compressed cluster over another one.
            if base.isCompressed, seed == 1 { arguments += ["-c", "write -c -P 9 1M 64k"] }
            for _ in 0..<6 {
                let offset = random.next(below: 4000) * 512
                let count = min(Self.size - offset, (1 + random.next(below: 200)) * 512)
                arguments += ["-c", "write -P \(1 + random.next(below: 250)) \(offset) \(count)"]
            }
            try folder.run(arguments + ["a.qcow2"])
        }
        try write(1)
        for number in 0..<base.snapshots {
            try folder.run(["qemu-img", "snapshot", "-c", "s\(number)", "a.qcow2"])
            try write(number + 2)
        }
        for number in 0..<base.bitmaps {
            try folder.run([
                "qemu-img", "bitmap", "--add", "-g", "4096", "a.qcow2", "b\(number)",
            ])
        }
        if base.bitmaps > 0 { try write(9) }
        try folder.check("a.qcow2")
        return (folder, try folder.bytes("a.qcow2"))
    }

    /// Reads, maps, writes, checks and repairs the image; errors are as good as values.
    private func useEveryWay(_ folder: QCOW2TestFolder, _ original: [UInt8]) async throws {
        _ = try? await folder.open("x.qcow2", writable: false, options: ["backing": .null]) {
            edge throws(BlockError) in
            _ = try await edge.node.driver.information
            var offset = 0
            while offset < min(edge.size, Self.size) {
                let range = ByteRange(offset, min(edge.size, Self.size) - offset)
                offset += try await edge.chainStatus(range).count
            }
            for offset in stride(from: 0, to: min(edge.size, Self.size), by: 65536) {
                let vector = try IOVector(allocating: min(65536, edge.size - offset))
                try? await edge.read(offset, into: vector)
            }
        }
        _ = try? await folder.open("x.qcow2", options: ["backing": .null]) {
            edge throws(BlockError) in
            for offset in stride(from: 0, to: min(edge.size, Self.size), by: 70_000) {
                let vector = try IOVector(allocating: min(9_000, edge.size - offset))
                vector.fill(3)
                try await edge.write(offset, from: vector)
            }
            try await edge.writeZeroes(ByteRange(0, min(edge.size, 300_000)))
            try await edge.discard(ByteRange(0, min(edge.size, 500_000)))
            try await edge.flush()
        }
        // What the writes made of it is another image to repair.
        _ = try? await folder.mendOrCheck("x.qcow2")
        _ = try? await folder.mendOrCheck("x.qcow2", .all)
        try folder.write(original, "x.qcow2")
        _ = try? await folder.mendOrCheck("x.qcow2", .leaks)
    }

    @Test(arguments: Base.all)
    func damagedTablesAreRefusedOrRepaired(base: Base) async throws {
        let (folder, good) = try make(base)
        let tables = Tables(of: good)
        for seed in 0..<Self.seedCount {
            var random = QCOW2TestRandom(seed: seed * 7 + 1)
            var damaged = QCOW2Bytes(bytes: good)
            tables.damage(&damaged, &random)
            if random.next(below: 8) == 0 {
                damaged.bytes.removeLast(random.next(below: damaged.bytes.count / 2))
            }
            try folder.write(damaged.bytes, "x.qcow2")
            try await useEveryWay(folder, damaged.bytes)

            try folder.write(damaged.bytes, "x.qcow2")
            let report = try await folder.mendOrCheck("x.qcow2", .all)
            #expect(report.corruptions == 0 && report.leaks == 0, "seed \(seed)")
            #expect(throws: Never.self, "seed \(seed)") { try folder.check("x.qcow2") }
        }
    }

    /// Every field of the header, at its extremes.
    private static let fields: [(name: String, offset: Int, bytes: Int)] = [
        ("magic", 0, 4), ("version", 4, 4), ("backing offset", 8, 8), ("backing length", 16, 4),
        ("cluster bits", 20, 4), ("size", 24, 8), ("encryption", 32, 4), ("L1 entries", 36, 4),
        ("L1 offset", 40, 8), ("refcount table", 48, 8), ("refcount clusters", 56, 4),
        ("snapshots", 60, 4), ("snapshot table", 64, 8), ("incompatible", 72, 8),
        ("compatible", 80, 8), ("autoclear", 88, 8), ("refcount order", 96, 4),
        ("header length", 100, 4), ("compression", 104, 1), ("first extension", 112, 4),
        ("its length", 116, 4),
    ]

    private static let extremes: [UInt64] = [
        0, 1, 2, 7, 9, 21, 22, 63, 64, 0x1_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff,
        0x1_0000_0000, 0x1_0000_0001, 0x0080_0000_0000_0000, 0x0100_0000_0000_0000,
        0x4000_0000_0000_0000, 0x8000_0000_0000_0000, 0xffff_ffff_ffff_fe00,
        0xffff_ffff_ffff_ffff,
    ]

    @Test(arguments: extremes) func headerFieldsAtTheirExtremesAreRefusedOrUsable(value: UInt64)
        async throws
    {
        let (folder, good) = try make(Base.all[2])
        for field in Self.fields {
            var damaged = QCOW2Bytes(bytes: good)
            switch field.bytes {
            case 1: damaged.bytes[field.offset] = UInt8(truncatingIfNeeded: value)
            case 4:
                damaged.bytes.withUnsafeMutableBytes {
                    $0.storeBigEndian(UInt32(truncatingIfNeeded: value), at: field.offset)
                }
            default: damaged.set(field.offset, value)
            }
            try folder.write(damaged.bytes, "x.qcow2")
            try await useEveryWay(folder, damaged.bytes)
        }
    }

    @Test func everyTruncationIsRefusedOrRepaired() async throws {
        let (folder, good) = try make(Base.all[0])
        var lengths = Array(stride(from: 0, to: good.count, by: 50_001))
        lengths += [1, 71, 72, 103, 104, 112, 511, 512, 65_535, 65_536, 131_072, good.count - 1]
        for length in lengths {
            let damaged = Array(good[..<length])
            try folder.write(damaged, "x.qcow2")
            try await useEveryWay(folder, damaged)
            try folder.write(damaged, "x.qcow2")
            guard (try? await folder.mendOrCheck("x.qcow2", .all)) != nil else { continue }
            #expect(throws: Never.self, "\(length) bytes") { try folder.check("x.qcow2") }
        }
    }
}

/// Where an image's tables are.
private struct Tables {
    var places: [(offset: Int, count: Int)] = []
    let clusterSize: Int

    init(of image: [UInt8]) {
        let bytes = QCOW2Bytes(bytes: image)
        func number32(_ offset: Int) -> Int { Int(bytes.number(offset) >> 32) }
        clusterSize = 1 << number32(20)
        let (l1, l1Count, table) = (Int(bytes.number(40)), number32(36), Int(bytes.number(48)))
        places = [(l1, l1Count * 8), (table, 64)]
        for index in 0..<l1Count {
            let offset = Int(bytes.number(l1 + index * 8) & QCOW2.L1Entry.offsetMask)
            if offset > 0 { places.append((offset, clusterSize)) }
        }
        for index in 0..<min(64, clusterSize / 8) {
            let block = Int(bytes.number(table + index * 8))
            if block > 0 { places.append((block, clusterSize)) }
        }
        if number32(60) > 0 { places.append((Int(bytes.number(64)), 150)) }
        for item in (try? QCOW2HeaderTests.parse(image).extensions) ?? []
        where item.type == QCOW2.HeaderExtension.bitmaps {
            let directory = Int(QCOW2Bytes(bytes: item.data).number(16))
            places.append((directory, 60))
            places.append((Int(bytes.number(directory)), 32))
        }
        // The file may end before a table's cluster does.
        places = places.compactMap { place in
            let count = min(place.count, image.count - place.offset) / 8 * 8
            return count > 0 ? (place.offset, count) : nil
        }
    }

    func damage(_ image: inout QCOW2Bytes, _ random: inout QCOW2TestRandom) {
        let times = [1, 1, 2, 5, 20]
        for _ in 0..<times[random.next(below: 5)] {
            let place = places[random.next(below: places.count)]
            var offset = place.offset + random.next(below: place.count / 8) * 8
            if random.next(below: 3) > 0 {
                // Where there is something.
                let used = stride(from: place.offset, to: place.offset + place.count - 7, by: 8)
                    .filter { image.number($0) != 0 }
                if !used.isEmpty { offset = used[random.next(below: used.count)] }
            }
            let clusters = image.bytes.count / clusterSize
            switch random.next(below: 6) {
            case 0:
                let bit: UInt64 = 1 << UInt64(random.next(below: 64))
                image.set(offset, image.number(offset) ^ bit)
            case 1:
                let high = UInt64(random.next(below: 1 << 31)) << 32
                image.set(offset, high | UInt64(random.next(below: 1 << 31)))
            case 2: image.set(offset, 0)
            case 3:
                let cluster = UInt64(random.next(below: clusters + 2) * clusterSize)
                image.set(offset, cluster | QCOW2.L1Entry.copiedFlag)
            case 4:
                let other = places[random.next(below: places.count)].offset
                image.set(offset, UInt64(other) | QCOW2.L1Entry.copiedFlag)
            default: image.set(offset, .max)
            }
        }
    }
}
