import BlockCore
import BlockGraph
import Foundation
import QMP
import Testing

@testable import BlockFormats

/// How an image is made: every option that changes its structure.
struct QCOW2Variant: Sendable, CustomTestStringConvertible {
    var version = "v3"
    var clusterSize = 65536
    var refcountBits = 16
    var isLazy = false
    var preallocation = "off"
    var hasBacking = false
    var hasSubclusters = false

    var testDescription: String {
        "\(version), \(clusterSize), \(refcountBits) bits, lazy \(isLazy), \(preallocation), "
            + "backing \(hasBacking)\(hasSubclusters ? ", subclusters" : "")"
    }

    static let all: [QCOW2Variant] = [
        QCOW2Variant(),
        QCOW2Variant(version: "v2"),
        QCOW2Variant(version: "v2", hasBacking: true),
        QCOW2Variant(clusterSize: 512, refcountBits: 1),
        QCOW2Variant(clusterSize: 512, refcountBits: 64),
        QCOW2Variant(clusterSize: 4096, refcountBits: 2, hasBacking: true),
        QCOW2Variant(clusterSize: 2 << 20, refcountBits: 8),
        QCOW2Variant(refcountBits: 32, isLazy: true),
        QCOW2Variant(isLazy: true, hasBacking: true),
        QCOW2Variant(preallocation: "metadata"),
        QCOW2Variant(clusterSize: 4096, refcountBits: 4, preallocation: "falloc"),
        QCOW2Variant(clusterSize: 512, preallocation: "full"),
        QCOW2Variant(hasBacking: true),
        QCOW2Variant(hasSubclusters: true),
        QCOW2Variant(clusterSize: 16384, hasBacking: true, hasSubclusters: true),
        QCOW2Variant(clusterSize: 2 << 20, hasBacking: true, hasSubclusters: true),
        QCOW2Variant(preallocation: "metadata", hasSubclusters: true),
    ]

    func options(size: Int) -> JSONValue {
        var options: JSONObject = [
            "size": .integer(size), "version": .string(version),
            "cluster-size": .integer(clusterSize), "refcount-bits": .integer(refcountBits),
            "lazy-refcounts": .bool(isLazy), "preallocation": .string(preallocation),
        ]
        if hasSubclusters { options["extended-l2"] = true }
        if hasBacking {
            options["backing-file"] = "base.img"
            options["backing-fmt"] = "raw"
        }
        return .object(options)
    }
}

@Suite struct QCOW2InteropTests {
    static let size = 8 << 20

    /// Bytes that differ from place to place, with zeroes in between.
    static func pattern(_ count: Int, seed: Int) -> [UInt8] {
        var random = QCOW2TestRandom(seed: seed)
        var bytes = [UInt8](repeating: 0, count: count)
        var offset = 0
        while offset < count {
            let run = min(1 + random.next(below: 90_000), count - offset)
            let kind = random.next(below: 3)
            if kind > 0 {
                let first = random.next(below: 251)
                for index in offset..<(offset + run) {
                    bytes[index] = UInt8((first + index / (kind * 7)) % 251)
                }
            }
            offset += run
        }
        return bytes
    }

    @Test(arguments: QCOW2Variant.all) func newImagesPassQEMUsCheck(variant: QCOW2Variant)
        async throws
    {
        let folder = try QCOW2TestFolder()
        if variant.hasBacking { try folder.write(Self.pattern(3 << 20, seed: 1), "base.img") }
        try await folder.create("a.qcow2", variant.options(size: Self.size))
        try folder.check("a.qcow2")
        let text = try folder.run(["qemu-img", "info", "--output=json", "a.qcow2"])
        let info = try JSONParser.parse(text)
        #expect(info["virtual-size"] == .integer(Self.size))
        #expect(info["cluster-size"] == .integer(variant.clusterSize))
        let data = info["format-specific"]?["data"]
        #expect(data?["refcount-bits"] == .integer(variant.refcountBits))
        #expect(data?["compat"] == (variant.version == "v2" ? "0.10" : "1.1"))
        let contents = try await folder.contents("a.qcow2")
        let base = variant.hasBacking ? try folder.bytes("base.img") : []
        #expect(contents == base + [UInt8](repeating: 0, count: Self.size - base.count))
    }

    @Test(arguments: [
        ["-o", "compat=v2"], ["-o", "cluster_size=512,refcount_bits=1"], ["-o", "cluster_size=2M"],
        ["-c"], ["-c", "-o", "compression_type=zstd"], ["-c", "-o", "cluster_size=4k"],
        ["-c", "-o", "cluster_size=2M,compression_type=zstd"], ["-o", "preallocation=full"],
        ["-S", "0"],
    ])
    func imagesThatQEMUConvertsReadTheSame(options: [String]) async throws {
        let folder = try QCOW2TestFolder()
        // A size that is no multiple of any cluster.
        let bytes = Self.pattern(Self.size - 1536, seed: 2)
        try folder.write(bytes, "raw.img")
        try folder.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"] + options + ["raw.img", "a.qcow2"])
        #expect(try await folder.contents("a.qcow2") == bytes)
    }

    @Test func writingOverCompressedClustersKeepsTheRest() async throws {
        let folder = try QCOW2TestFolder()
        var bytes = Self.pattern(Self.size, seed: 3)
        try folder.write(bytes, "raw.img")
        try folder.run(
            ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "raw.img", "a.qcow2"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            var random = QCOW2TestRandom(seed: 3)
            for _ in 0..<200 {
                let offset = random.next(below: Self.size - 5000)
                let vector = try IOVector(allocating: 5000)
                vector.fill(0x5a)
                try await edge.write(offset, from: vector)
            }
        }
        var random = QCOW2TestRandom(seed: 3)
        for _ in 0..<200 {
            let offset = random.next(below: Self.size - 5000)
            for index in offset..<(offset + 5000) { bytes[index] = 0x5a }
        }
        try folder.check("a.qcow2")
        try folder.write(bytes, "raw.img")
        try folder.run(["qemu-img", "compare", "-F", "raw", "-f", "qcow2", "a.qcow2", "raw.img"])
    }

    @Test func aChainOfBackingFilesIsFollowed() async throws {
        let folder = try QCOW2TestFolder()
        let bytes = Self.pattern(3 << 20, seed: 4)
        try folder.write(bytes, "base.img")
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "mid.qcow2",
            "6M",
        ])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 100k", "mid.qcow2"])
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2",
            "-o", "cluster_size=4k", "top.qcow2", "8M",
        ])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -z 2M 10k", "top.qcow2"])
        var expected = bytes + [UInt8](repeating: 0, count: 5 << 20)
        for index in (1 << 20)..<(1 << 20 + 100 << 10) { expected[index] = 7 }
        for index in (2 << 20)..<(2 << 20 + 10 << 10) { expected[index] = 0 }
        #expect(try await folder.contents("top.qcow2") == expected)
    }

    @Test func blockStatusAgreesWithQEMUsMap() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "64M"])
        try folder.run([
            "qemu-io", "-f", "qcow2", "-c", "write 1M 3M", "-c", "write -z 8M 1M",
            "-c", "write 9M 64k", "-c", "discard 2M 128k", "a.qcow2",
        ])
        let text = try folder.run(["qemu-img", "map", "--output=json", "a.qcow2"])
        guard case .array(let map) = try JSONParser.parse(text) else {
            Issue.record("no map")
            return
        }
        let theirs = map.map { [$0["start"], $0["length"], $0["data"], $0["zero"], $0["present"]] }
        let ours = try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            var result: [[JSONValue?]] = []
            var offset = 0
            while offset < edge.size {
                let status = try await edge.chainStatus(ByteRange(offset, edge.size - offset))
                result.append([
                    .integer(offset), .integer(status.count), .bool(status.flags.contains(.data)),
                    .bool(status.flags.contains(.zero)), .bool(status.depth != nil),
                ])
                offset += status.count
            }
            return result
        }
        #expect(ours == theirs)
    }

    @Test(arguments: 1...3) func subclustersOfQEMUAreReadAndWritten(seed: Int) async throws {
        let folder = try QCOW2TestFolder()
        let size = 4 << 20
        let base = Self.pattern(3 << 20, seed: seed)
        try folder.write(base, "base.img")
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k",
            "-b", "base.img", "-F", "raw", "a.qcow2", "\(size)",
        ])
        var random = QCOW2TestRandom(seed: seed)
        for _ in 0..<3 {
            // Each in turn leaves clusters that are there in part.
            var commands: [String] = []
            for _ in 0..<40 {
                let offset = random.next(below: size / 512 - 200) * 512
                let count = (1 + random.next(below: random.next(below: 2) == 0 ? 8 : 200)) * 512
                let kind = ["write -P \(1 + random.next(below: 250))", "write -z", "write -zu"][
                    random.next(below: 6) / 2 % 3]
                commands += ["-c", "\(kind) \(offset) \(count)"]
            }
            try folder.run(["qemu-io", "-f", "qcow2"] + commands + ["a.qcow2"])
            try folder.run(["qemu-img", "convert", "-O", "raw", "a.qcow2", "peer.img"])
            let start = try folder.bytes("peer.img")
            #expect(try await folder.contents("a.qcow2") == start, "seed \(seed)")
            let loadSeed = random.next(below: 1 << 30)
            let (end, wrong) = try await folder.open("a.qcow2") { edge throws(BlockError) in
                let load = QCOW2Load(edge, seed: loadSeed, model: start)
                try await load.run(steps: 150)
                return (load.model, load.wrong)
            }
            #expect(wrong == [], "seed \(seed)")
            try folder.check("a.qcow2")
            try folder.write(end, "model.img")
            try folder.run([
                "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "model.img",
            ])
        }
    }

    @Test func aSmallWriteAllocatesASubclusterOnly() async throws {
        let folder = try QCOW2TestFolder()
        try folder.write(Self.pattern(1 << 20, seed: 1), "base.img")
        try await folder.create(
            "a.qcow2",
            [
                "size": .integer(1 << 20), "extended-l2": true, "backing-file": "base.img",
                "backing-fmt": "raw",
            ])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 512)
            vector.fill(1)
            try await edge.write(70_000, from: vector)
        }
        try folder.check("a.qcow2")
        let map = try folder.run(["qemu-img", "map", "--output=json", "a.qcow2"])
        // Subclusters of 2 KiB.
        #expect(map.contains("\"start\": 69632, \"length\": 2048, \"depth\": 0"), "\(map)")
    }

    @Test func writingAnImageLeavesItsSnapshotsAlone() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M", "a.qcow2"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 100_000)
            vector.fill(4)
            try await edge.write(50_000, from: vector)
            try await edge.writeZeroes(ByteRange(300_000, 200_000), .mayUnmap)
        }
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2") != [UInt8](repeating: 3, count: 1 << 20))
        try folder.run(["qemu-img", "snapshot", "-a", "s", "a.qcow2"])
        #expect(try await folder.contents("a.qcow2") == [UInt8](repeating: 3, count: 1 << 20))
    }
}

/// Images whose clusters have a place while they show what is below.
@Suite struct QCOW2PreallocatedOverlayTests {
    static let size = 3 << 20

    @Test(arguments: ["metadata", "falloc", "full"], [false, true])
    func withSubclustersAPreallocatedImageShowsItsBackingImage(
        preallocation: String, isEncrypted: Bool
    ) async throws {
        let folder = try QCOW2TestFolder()
        var bytes = QCOW2InteropTests.pattern(Self.size, seed: 41)
        try folder.write(bytes, "base.img")
        var options: JSONObject = [
            "size": .integer(Self.size), "extended-l2": true, "backing-fmt": "raw",
            "preallocation": .string(preallocation), "backing-file": .string(folder["base.img"]),
        ]
        if isEncrypted {
            for (key, value) in QCOW2SimulationTests.encryption.members { options[key] = value }
        }
        try await folder.create("a.qcow2", .object(options))
        let key: JSONValue = .object(isEncrypted ? QCOW2SimulationTests.key : [:])
        let clusters = try folder.bytes("a.qcow2").count
        #expect(clusters > Self.size)
        #expect(try await folder.contents("a.qcow2", options: key) == bytes)
        try await folder.open("a.qcow2", options: key) { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 100_000..<101_000, 5)
            try await edge.writeZeroes(ByteRange(1 << 20, 70_000))
        }
        for index in 100_000..<101_000 { bytes[index] = 5 }
        for index in 1 << 20..<1 << 20 + 70_000 { bytes[index] = 0 }
        // In the places that were made ready.
        #expect(try folder.bytes("a.qcow2").count == clusters)
        try folder.write(bytes, "raw.img")
        let name = "driver=qcow2,file.filename=a.qcow2"
        try folder.run(
            ["qemu-img", "convert"] + QCOW2TestFolder.objects
                + ["--image-opts", "-O", "raw"]
                + [isEncrypted ? "\(name),encrypt.key-secret=good" : name, "b.img"])
        #expect(try folder.bytes("b.img") == bytes)
        try folder.run(
            ["qemu-img", "check"] + QCOW2TestFolder.objects
                + ["--image-opts"]
                + [isEncrypted ? "\(name),encrypt.key-secret=good" : name])
    }

    @Test func withoutSubclustersItIsRefused() async throws {
        let folder = try QCOW2TestFolder()
        await #expect(throws: BlockError.self) {
            try await folder.create(
                "a.qcow2",
                ["size": 65536, "preallocation": "metadata", "backing-file": "base.img"])
        }
    }

    /// Its new header keeps what writing out what was pending put into the old one.
    @Test func anImageWithLateRefcountsStaysMarkedWhenItsBackingFileChanges() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "a.qcow2", "1M",
        ])
        let path = folder["a.qcow2"]
        let header = try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 65536)
            vector.fill(7)
            try await edge.write(0, from: vector)
            guard let image = edge.node.driver as? any BackedImage else { return [UInt8]() }
            try await image.setBacking(name: "base", format: "raw")
            return [UInt8](FileManager.default.contents(atPath: path) ?? Data())
        }
        let bytes = QCOW2Bytes(bytes: header)
        #expect(bytes.number(8) != 0)
        #expect(bytes.number(72) & 1 == 1)
    }
}
