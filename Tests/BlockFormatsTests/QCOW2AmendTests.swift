import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

/// Properties of an image that change while it is open, beside QEMU's tools.
@Suite struct QCOW2AmendTests {
    static let size = 3 << 20

    static func amend(_ edge: Edge, _ options: JSONValue) async throws(BlockError) {
        let amendment = ImageAmendment(try OptionReader(options, of: "amend"))
        try await edge.node.graph.amend(edge.node, amendment)
    }

    /// - Returns: why it was refused, `nil` if it was not.
    static func refusal(_ edge: Edge, _ options: JSONValue) async -> BlockError? {
        do throws(BlockError) {
            try await amend(edge, options)
            return nil
        } catch {
            return error
        }
    }

    /// One value of what `qemu-img info` says of the format.
    static func information(
        _ folder: QCOW2TestFolder, _ key: String
    ) throws -> JSONValue? {
        let text = try folder.run(["qemu-img", "info", "--output=json", "a.qcow2"])
        return try JSONParser.parse(text)["format-specific"]?["data"]?[key]
    }

    // MARK: Refcounts

    static let widths: [(from: Int, to: Int, clusterSize: Int)] = [
        (16, 64, 65536), (16, 8, 65536), (64, 2, 4096), (2, 64, 512), (1, 16, 512), (16, 1, 512),
        (8, 32, 2 << 20), (16, 4, 4096),
    ]

    @Test(arguments: widths) func refcountsTakeAnotherWidthAndRequestsGoOn(
        from: Int, to: Int, clusterSize: Int
    ) async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create(
            "a.qcow2",
            [
                "size": .integer(Self.size), "cluster-size": .integer(clusterSize),
                "refcount-bits": .integer(from),
            ])
        // Neither is to be lost: the bitmap, and where the width allows it a snapshot.
        let hasSnapshot = from > 1 && to > 1
        let violations = try await folder.open("a.qcow2") { edge throws(BlockError) in
            let shadow = ShadowDisk(size: edge.size)
            try await edge.node.makeDirtyBitmap(named: "b", persistent: true)
            let before = RandomRequests(edge, shadow, seed: 5)
            await before.run()
            if hasSnapshot { try await QCOW2SnapshotTests.create(edge, "s") }
            let snapshot = try await QCOW2SnapshotTests.everything(edge)
            try await Self.amend(edge, ["refcount-bits": .integer(to)])
            let after = RandomRequests(edge, shadow, seed: 6)
            await after.run()
            await after.verify()
            var wrong = before.violations + after.violations
            if hasSnapshot,
                try await QCOW2SnapshotTests.contents(edge, ofSnapshot: "s") != snapshot
            {
                wrong.append("the snapshot is damaged")
            }
            return wrong
        }
        #expect(violations == [])
        try folder.check("a.qcow2")
        #expect(try Self.information(folder, "refcount-bits") == .integer(to))
        #expect(try QCOW2BitmapTests.flagsByQEMU(folder, "a.qcow2") == ["b": ["auto"]])
        let contents = try await folder.contents("a.qcow2")
        try folder.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "raw.img"])
        #expect(try folder.bytes("raw.img") == contents)
    }

    @Test func aWidthThatCannotCountIsRefusedAndNothingChanges() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 0..<100_000, 1)
            try await QCOW2SnapshotTests.create(edge, "s")
            let refused = await Self.refusal(edge, ["refcount-bits": 1])
            #expect(refused?.code == .unsupported, "\(refused?.description ?? "")")
            for bits in [3, 0, 128] {
                let error = await Self.refusal(edge, ["refcount-bits": .integer(bits)])
                #expect(error?.code == .invalidArgument, "\(bits)")
            }
            try await QCOW2SnapshotTests.fill(edge, 0..<100_000, 2)
        }
        try folder.check("a.qcow2")
        #expect(try Self.information(folder, "refcount-bits") == 16)
    }

    @Test func anImageWithErrorsKeepsItsRefcounts() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try folder.run(["qemu-io", "-c", "write 0 128k", "a.qcow2"])
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        bytes.set(bytes.entry(1), 1 << 40 | QCOW2CheckTests.copied)
        try folder.write(bytes.bytes, "a.qcow2")
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let refused = await Self.refusal(edge, ["refcount-bits": 64])
            #expect(refused?.code == .corrupt, "\(refused?.description ?? "")")
        }
        #expect(try Self.information(folder, "refcount-bits") == 16)
    }

    @Test func withTheRightWidthAnImageGoesBackToVersion2() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "refcount_bits=64", "a.qcow2", "1M",
        ])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 0..<100_000, 1)
            try await QCOW2SnapshotTests.create(edge, "s")
            #expect(await Self.refusal(edge, ["version": "v2"])?.code == .unsupported)
            try await Self.amend(edge, ["version": "v2", "refcount-bits": 16])
            try await QCOW2SnapshotTests.fill(edge, 50_000..<200_000, 2)
        }
        #expect(try Self.information(folder, "compat") == "0.10")
        try folder.check("a.qcow2")
    }

    @Test("zeroes of snapshots are written out for version 2", arguments: [false, true])
    func zeroesOfSnapshots(_ hasBacking: Bool) async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "raw", "base", "1M"])
        try folder.run(["qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "base"])
        let backing = hasBacking ? ["-b", "base", "-F", "raw"] : []
        // Small clusters: several tables, shared and not.
        try folder.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"] + backing
                + ["a.qcow2", "6M"])
        func write(_ commands: String...) throws {
            try folder.run(["qemu-io"] + commands.flatMap { ["-c", $0] } + ["a.qcow2"])
        }
        try write("write -P 1 0 512k", "write -z 64k 64k", "write -z 700k 64k", "write -P 2 3M 1M")
        try folder.run(["qemu-img", "snapshot", "-c", "one", "a.qcow2"])
        try write("write -z 0 32k", "write -P 3 100k 8k", "write -z 3M 1M", "write -z 5M 64k")
        try folder.run(["qemu-img", "snapshot", "-c", "two", "a.qcow2"])
        try write("write -P 4 8k 8k")
        func contents(_ options: [String]) throws -> [UInt8] {
            try folder.run(["qemu-img", "convert", "-O", "raw"] + options + ["a.qcow2", "out"])
            return try folder.bytes("out")
        }
        let views = [[], ["-l", "snapshot.name=one"], ["-l", "snapshot.name=two"]]
        let before = try views.map(contents)
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.amend(edge, ["version": "v2"])
        }
        #expect(try Self.information(folder, "compat") == "0.10")
        try folder.check("a.qcow2")
        #expect(try views.map(contents) == before)
        // The counts are right: what was shared can be given up.
        for name in ["one", "two"] {
            try folder.run(["qemu-img", "snapshot", "-d", name, "a.qcow2"])
            try folder.check("a.qcow2")
        }
        #expect(try contents([]) == before[0])
    }

    @Test func zeroesStayInVersion2WhenTheBackingFileIsLeftOut() async throws {
        let folder = try QCOW2TestFolder()
        try folder.write([UInt8](repeating: 7, count: 1 << 20), "base")
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "a.qcow2",
        ])
        try folder.run(["qemu-io", "-c", "write -z 64k 128k", "a.qcow2"])
        let before = try await folder.contents("a.qcow2")
        try await folder.open("a.qcow2", options: ["backing": .null]) { edge throws(BlockError) in
            try await Self.amend(edge, ["version": "v2"])
        }
        #expect(try Self.information(folder, "compat") == "0.10")
        #expect(try await folder.contents("a.qcow2") == before)
        try folder.check("a.qcow2")
    }

    @Test func aReaderOfASnapshotSeesTheSameInVersion2() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try folder.run(["qemu-io", "-c", "write -P 5 0 128k", "-c", "write -z 0 64k", "a.qcow2"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            guard let store = edge.node.driver.snapshotStore else { return }
            let reader = try await store.openSnapshot("1", for: edge.node)
            let vector = try IOVector(allocating: 128 << 10)
            try await reader.readSnapshot(0, into: vector)
            let before = vector.array
            try await Self.amend(edge, ["version": "v2"])
            try await reader.readSnapshot(0, into: vector)
            #expect(vector.array == before)
            reader.close()
        }
    }

    // MARK: Data files

    @Test func theDataFileTakesAnotherNameAndNeedNotStayRaw() async throws {
        let folder = try QCOW2TestFolder()
        try await QCOW2DataFileTests.create(folder, ["data-file-raw": true])
        let (other, raw) = (folder["b.data"], folder["a.data"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 0..<100_000, 1)
            // As it is.
            try await Self.amend(edge, ["data-file-raw": true])
            try await Self.amend(edge, ["data-file": .string(other)])
        }
        #expect(try Self.information(folder, "data-file-raw") == true)
        try folder.run(["mv", raw, other])
        #expect(try Self.information(folder, "data-file") == .string(other))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.amend(edge, ["data-file-raw": false])
            #expect(await Self.refusal(edge, ["data-file-raw": true])?.code == .invalidArgument)
            try await QCOW2SnapshotTests.fill(edge, 200_000..<300_000, 2)
        }
        #expect(try Self.information(folder, "data-file-raw") == false)
        try folder.check("a.qcow2")
        let contents = try await folder.contents("a.qcow2")
        #expect(contents[..<100_000].allSatisfy { $0 == 1 })
        #expect(contents[200_000..<300_000].allSatisfy { $0 == 2 })
    }

    @Test func anImageWithoutADataFileTakesNoNameOfOne() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            for options in [["data-file": "x"], ["data-file-raw": true]] as [JSONValue] {
                #expect(await Self.refusal(edge, options)?.code == .invalidArgument)
            }
        }
    }
}
