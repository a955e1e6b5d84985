import BlockCore
import Testing

@testable import BlockFormats

@Suite struct QCOW2HeaderTests {
    static func parse(_ bytes: [UInt8]) throws -> QCOW2.Header {
        try bytes.withUnsafeBytes { bytes in
            let cluster = 1 << (try QCOW2.Header.clusterBits(of: bytes))
            return try QCOW2.Header(
                parsing: UnsafeRawBufferPointer(rebasing: bytes.prefix(cluster)),
                fileSize: bytes.count)
        }
    }

    @Test(arguments: [512, 4096, 65536, 2 << 20])
    func headersThatQEMUWritesAreParsed(clusterSize: Int) throws {
        let folder = try QCOW2TestFolder()
        for (index, order) in [0, 1, 2, 3, 4, 5, 6].enumerated() {
            let isZstd = index % 2 == 1
            try folder.run([
                "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "base.img", "-F", "raw",
                "-o",
                "cluster_size=\(clusterSize),refcount_bits=\(1 << order),lazy_refcounts=on,"
                    + "compression_type=\(isZstd ? "zstd" : "zlib")", "a.qcow2", "10M",
            ])
            let header = try Self.parse(folder.bytes("a.qcow2"))
            #expect(header.version == 3)
            #expect(1 << header.clusterBits == clusterSize)
            #expect(header.refcountOrder == order)
            #expect(header.size == 10 << 20)
            #expect(header.compatible == .lazyRefcounts)
            #expect(header.compression == (isZstd ? .zstd : .zlib))
            #expect(String(decoding: header.backingName, as: UTF8.self) == "base.img")
            #expect(header.backingFormat == "raw")
        }
    }

    @Test func aHeaderSurvivesSerialisation() throws {
        var header = QCOW2.Header()
        header.size = 12345 << 9
        header.l1EntryCount = 1
        header.l1Offset = 3 << 16
        header.refcountTableOffset = 1 << 16
        header.refcountTableClusters = 1
        header.backingName = Array("some name".utf8)
        header.unknownFields = [1, 2, 3, 4, 5, 6, 7, 8]
        header.extensions = [
            .init(type: QCOW2.HeaderExtension.backingFormat, data: Array("raw".utf8)),
            .init(type: 0xdead_beef, data: [9, 9, 9, 9, 9, 9, 9, 9, 9]),
        ]
        let bytes = try header.serialised() + [UInt8](repeating: 0, count: 1 << 18)
        #expect(try Self.parse(bytes) == header)
    }

    @Test func everyDamagedByteIsParsedOrRefused() throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        let good = try folder.bytes("a.qcow2")
        var refused = 0
        for offset in 0..<600 {
            for value in [UInt8(0), 0x7f, 0xff] {
                var bytes = good
                bytes[offset] = value
                do { _ = try Self.parse(bytes) } catch { refused += 1 }
            }
        }
        #expect(refused > 50)
        for count in [0, 1, 71, 72, 103, 104, 111, 112, 500] {
            #expect(throws: BlockError.self) { try Self.parse(Array(good.prefix(count))) }
        }
    }

    @Test func anUnknownFeatureIsNamed() throws {
        var header = QCOW2.Header()
        header.l1EntryCount = 1
        header.l1Offset = 3 << 16
        header.refcountTableOffset = 1 << 16
        header.refcountTableClusters = 1
        header.incompatible = .init(rawValue: 1 << 40)
        header.extensions = [
            .init(
                type: QCOW2.HeaderExtension.featureNames,
                data: QCOW2.FeatureName.serialise([.init(kind: 0, bit: 40, name: "time travel")]))
        ]
        let bytes = try header.serialised() + [UInt8](repeating: 0, count: 1 << 18)
        do {
            _ = try Self.parse(bytes)
            Issue.record("parsed")
        } catch let error as BlockError {
            #expect(error.code == .unsupported)
            #expect(error.message.contains("time travel"))
        }
    }

    @Test(arguments: 0...6) func refcountsOfEveryWidthKeepTheirNeighbours(order: Int) throws {
        var block = [UInt8](repeating: 0, count: 512)
        let count = (512 * 8) >> order
        let max: UInt64 = order == 6 ? .max : (1 << (1 << UInt64(order))) - 1
        var model = [UInt64](repeating: 0, count: count)
        var random = QCOW2TestRandom(seed: order)
        for _ in 0..<5000 {
            let index = random.next(below: count)
            let value = UInt64(random.next(below: 1 << 30)) & max
            model[index] = value
            block.withUnsafeMutableBytes { QCOW2.Refcount.set($0, index, to: value, order: order) }
        }
        let read = block.withUnsafeBytes { bytes in
            (0..<count).map { QCOW2.Refcount.get(bytes, $0, order: order) }
        }
        #expect(read == model)
    }
}
