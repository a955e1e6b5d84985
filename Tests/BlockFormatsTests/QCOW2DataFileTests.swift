import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

@Suite struct QCOW2DataFileTests {
    static let size = 3 << 20

    /// Makes `a.qcow2` with its data in `a.data`.
    static func create(_ folder: QCOW2TestFolder, _ more: JSONObject = [:]) async throws {
        try folder.write([], "a.data")
        var options: JSONObject = [
            "size": .integer(size),
            "data-file": ["driver": "file", "filename": .string(folder["a.data"])],
        ]
        for (key, value) in more.members { options[key] = value }
        try await folder.create("a.qcow2", .object(options))
    }

    @Test(arguments: [false, true], [512, 65536])
    func imagesMadeHereFollowTheModelAndReadTheSameInQEMU(
        isRaw: Bool, clusterSize: Int
    ) async throws {
        let folder = try QCOW2TestFolder()
        try await Self.create(
            folder, ["data-file-raw": .bool(isRaw), "cluster-size": .integer(clusterSize)])
        try folder.check("a.qcow2")
        let violations = try await folder.open("a.qcow2") { edge throws(BlockError) in
            var options = RandomRequests.Options()
            options.requestBytesMax = 200_000
            let run = RandomRequests(edge, ShadowDisk(size: edge.size), seed: 13, options)
            await run.run()
            await run.verify()
            return run.violations
        }
        #expect(violations == [])
        try folder.check("a.qcow2")
        let contents = try await folder.contents("a.qcow2")
        try folder.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "raw.img"])
        #expect(try folder.bytes("raw.img") == contents)
        if isRaw { #expect(try folder.bytes("a.data") == contents) }
    }

    @Test(arguments: ["off", "on"])
    func imagesThatQEMUMakesAreReadAndWritten(raw: String) async throws {
        let folder = try QCOW2TestFolder()
        var bytes = QCOW2InteropTests.pattern(Self.size, seed: 31)
        try folder.write(bytes, "raw.img")
        try folder.run([
            "qemu-img", "convert", "-f", "raw", "-O", "qcow2",
            "-o", "data_file=\(folder["x.data"]),data_file_raw=\(raw)", "raw.img", "a.qcow2",
        ])
        #expect(try await folder.contents("a.qcow2") == bytes)
        let theirs = try JSONParser.parse(
            folder.run(["qemu-img", "info", "--output=json", "a.qcow2"]))
        let ours = try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 70_000)
            vector.fill(3)
            try await edge.write(0, from: vector)
            try await edge.write(500_000, from: vector)
            return try await edge.node.driver.information.formatSpecific
        }
        #expect(ours == theirs["format-specific"])
        for start in [0, 500_000] {
            for index in start..<(start + 70_000) { bytes[index] = 3 }
        }
        try folder.check("a.qcow2")
        try folder.write(bytes, "raw.img")
        try folder.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "raw.img"])
    }

    @Test func aDiskGrowsAndShrinksWithItsDataFile() async throws {
        let folder = try QCOW2TestFolder()
        try await Self.create(folder, ["data-file-raw": true])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await edge.resize(to: 5 << 20)
            let vector = try IOVector(allocating: 1 << 20)
            vector.fill(9)
            try await edge.write(4 << 20, from: vector)
        }
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2") == folder.bytes("a.data"))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await edge.resize(to: 2 << 20)
        }
        try folder.check("a.qcow2")
        #expect(try folder.bytes("a.data").count == 2 << 20)
    }

    @Test(arguments: [false, true])
    func aDataFileThatIsTooShortGrowsWithTheFirstWritePastItsEnd(isRaw: Bool) async throws {
        let folder = try QCOW2TestFolder()
        try await Self.create(folder, ["data-file-raw": .bool(isRaw)])
        let size = Self.size
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 0..<size, 1)
        }
        try folder.run(["truncate", "-s", "1M", "a.data"])
        var expected = [UInt8](repeating: 1, count: 1 << 20)
        expected += [UInt8](repeating: 0, count: size - expected.count)
        let before = try await folder.open("a.qcow2", resizes: false) { edge throws(BlockError) in
            try await QCOW2SnapshotTests.everything(edge)
        }
        #expect(before == expected)
        #expect(try folder.bytes("a.data").count == 1 << 20)
        // Across the end of the data file, and past it.
        let written = [1_000_000..<1_100_000, 2_500_000..<2_600_000]
        try await folder.open("a.qcow2", resizes: false) { edge throws(BlockError) in
            for range in written { try await QCOW2SnapshotTests.fill(edge, range, 9) }
        }
        for range in written { expected.replaceSubrange(range, with: range.map { _ in 9 }) }
        #expect(try await folder.contents("a.qcow2") == expected)
        try folder.check("a.qcow2")
        #expect(try folder.bytes("a.data") == expected)
    }

    @Test func zeroesPastTheEndOfARawDataFileNeedNotBeThere() async throws {
        let folder = try QCOW2TestFolder()
        try await Self.create(folder, ["data-file-raw": true])
        try folder.run(["truncate", "-s", "1M", "a.data"])
        try await folder.open("a.qcow2", resizes: false) { edge throws(BlockError) in
            try await edge.discard(ByteRange(0, edge.size))
            try await edge.writeZeroes(ByteRange(2 << 20, 65536))
        }
        #expect(try await folder.contents("a.qcow2").allSatisfy { $0 == 0 })
    }

    @Test func aNameThatTheImageCouldNotBeOpenedWithIsRefused() async throws {
        let folder = try QCOW2TestFolder()
        for name in ["json:{}", "nbd://host/x"] {
            let error = await #expect(throws: BlockError.self) {
                try await folder.create(
                    "a.qcow2",
                    ["size": 65536, "data-file": ["driver": "file", "filename": .string(name)]])
            }
            #expect(error?.code == .invalidArgument)
        }
    }

    @Test func compressedDataIsRefused() async throws {
        let folder = try QCOW2TestFolder()
        try await Self.create(folder)
        try await folder.expectNoCompressedData("a.qcow2")
    }

    @Test func aMissingDataFileIsNamed() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=gone.data", "a.qcow2", "1M",
        ])
        try folder.run(["rm", "gone.data"])
        do {
            _ = try await folder.contents("a.qcow2")
            Issue.record("opened")
        } catch let error as BlockError {
            #expect(error.message.contains("gone.data"), "\(error)")
        }
    }
}
