import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

/// How an image that takes compressed data is made.
struct QCOW2CompressedVariant: Sendable, CustomTestStringConvertible {
    var compression = "zlib"
    var clusterSize = 65536
    var refcountBits = 16
    var version = "v3"

    var testDescription: String {
        "\(compression), \(clusterSize), \(refcountBits) bits, \(version)"
    }

    func options(size: Int) -> JSONValue {
        [
            "size": .integer(size), "version": .string(version),
            "cluster-size": .integer(clusterSize), "refcount-bits": .integer(refcountBits),
            "compression-type": .string(compression),
        ]
    }

    static let all: [QCOW2CompressedVariant] = [
        QCOW2CompressedVariant(),
        QCOW2CompressedVariant(compression: "zstd"),
        QCOW2CompressedVariant(version: "v2"),
        QCOW2CompressedVariant(clusterSize: 512, refcountBits: 1),
        QCOW2CompressedVariant(compression: "zstd", clusterSize: 512, refcountBits: 2),
        QCOW2CompressedVariant(clusterSize: 4096, refcountBits: 64),
        QCOW2CompressedVariant(compression: "zstd", clusterSize: 2 << 20),
        QCOW2CompressedVariant(clusterSize: 2 << 20, refcountBits: 8),
    ]
}

@Suite struct QCOW2CompressedWriteTests {
    /// Not a multiple of any cluster: the last one is short.
    static let size = 3 << 20 - 1536

    /// Bytes of which some clusters shrink, and some do not.
    static func mixture(_ count: Int, seed: Int) -> [UInt8] {
        var bytes = QCOW2InteropTests.pattern(count, seed: seed)
        var random = QCOW2TestRandom(seed: seed)
        for start in stride(from: 0, to: count, by: 200_000) where random.next(below: 4) == 0 {
            for index in start..<min(start + 130_000, count) {
                bytes[index] = UInt8(random.next(below: 256))
            }
        }
        return bytes
    }

    /// Writes all of `bytes`, compressed, several requests at once.
    static func writeCompressed(
        _ bytes: [UInt8], _ edge: Edge, request: Int
    ) async throws(BlockError) {
        let thread = edge.node.thread
        var tasks: [Task<Result<Void, BlockError>, Never>] = []
        for start in stride(from: 0, to: bytes.count, by: request) {
            let part = Array(bytes[start..<min(start + request, bytes.count)])
            tasks.append(
                Task(executorPreference: thread) { () async -> Result<Void, BlockError> in
                    do throws(BlockError) {
                        let vector = try IOVector(allocating: part.count)
                        part.withUnsafeBytes { vector.copy(from: $0) }
                        try await edge.write(start, from: vector, .compressed)
                        return .success(())
                    } catch {
                        return .failure(error)
                    }
                })
        }
        for task in tasks { try await task.value.get() }
    }

    @Test(arguments: QCOW2CompressedVariant.all)
    func whatIsWrittenCompressedReadsTheSameEverywhere(
        variant: QCOW2CompressedVariant
    ) async throws {
        let folder = try QCOW2TestFolder()
        let bytes = Self.mixture(Self.size, seed: 11)
        try await folder.create("a.qcow2", variant.options(size: Self.size))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.writeCompressed(bytes, edge, request: max(1 << 20, variant.clusterSize))
        }
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2") == bytes)
        try folder.write(bytes, "raw.img")
        try folder.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "raw.img"])
    }

    @Test(arguments: ["zlib", "zstd"])
    func theFileIsHardlyLargerThanQEMUs(compression: String) async throws {
        let folder = try QCOW2TestFolder()
        let bytes = Self.mixture(Self.size, seed: 12)
        try folder.write(bytes, "raw.img")
        try folder.run([
            "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
            "-o", "compression_type=\(compression)", "raw.img", "theirs.qcow2",
        ])
        try await folder.create(
            "ours.qcow2",
            QCOW2CompressedVariant(compression: compression).options(size: Self.size))
        try await folder.open("ours.qcow2") { edge throws(BlockError) in
            try await Self.writeCompressed(bytes, edge, request: 1 << 20)
        }
        let ours = try folder.bytes("ours.qcow2").count
        let theirs = try folder.bytes("theirs.qcow2").count
        // Two clusters of metadata may stand elsewhere.
        #expect(ours <= theirs + theirs * 3 / 100 + 131_072, "\(ours) against \(theirs)")
    }

    @Test(arguments: QCOW2CompressedVariant.all)
    func compressedClustersAreOverwrittenByEitherKind(
        variant: QCOW2CompressedVariant
    ) async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", variant.options(size: Self.size))
        for seed in 1...2 as ClosedRange<UInt64> {
            let violations = try await folder.open("a.qcow2") { edge throws(BlockError) in
                let shadow = ShadowDisk(size: Self.size)
                try await edge.writeZeroes(ByteRange(0, edge.size), .mayUnmap)
                var options = RandomRequests.Options()
                options.compressedUnit = variant.clusterSize
                options.requestBytesMax = 300_000
                let run = RandomRequests(edge, shadow, seed: seed, options)
                await run.run()
                await run.verify()
                return run.violations
            }
            #expect(violations == [], "seed \(seed)")
            try folder.check("a.qcow2")
        }
    }

    @Test func partsOfClustersAreRefused() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2CompressedVariant().options(size: 1 << 20))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            for (offset, count) in [(512, 65536), (0, 4096), (65536, 65536 + 512)] {
                let vector = try IOVector(allocating: count)
                vector.fill(1)
                do throws(BlockError) {
                    try await edge.write(offset, from: vector, .compressed)
                    Issue.record("\(count) bytes at \(offset) were taken")
                } catch {
                    #expect(error.code == .invalidArgument)
                }
            }
        }
    }

    @Test func smallClustersShareHostClusters() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2CompressedVariant().options(size: 8 << 20))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.writeCompressed(
                [UInt8](repeating: 7, count: 8 << 20), edge, request: 1 << 20)
        }
        // 128 clusters of some 80 bytes fit in one, beside the five of metadata.
        #expect(try folder.bytes("a.qcow2").count <= 8 * 65536)
        try folder.check("a.qcow2")
    }
}
