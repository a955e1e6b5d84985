import BlockCore
import BlockFormats
import BlockGraph
import BlockTesting
import QMP
import Testing

/// Block status of images, many runs at a time.
@Suite struct QCOW2StatusTests {
    /// What is said of each sector, whatever runs it was said in.
    private struct Sector: Equatable, Sendable {
        var flags: ExtentFlags
        var depth: Int?
        var offset: Int?
    }

    private static func sectors(
        _ edge: Edge, limit: Int, from start: Int = 0, step: Int = .max
    ) async throws(BlockError) -> [Sector] {
        let answer = BlockStatusList(limit: limit)
        var sectors: [Sector] = []
        var offset = start
        while offset < edge.size {
            let count = min(edge.size - offset, step)
            try await edge.chainStatus(ByteRange(offset, count), into: answer)
            for run in answer.runs {
                for done in stride(from: 0, to: run.count, by: 512) {
                    sectors.append(
                        Sector(
                            flags: run.flags.subtracting(.endOfNode), depth: run.depth,
                            offset: run.mapping.map { $0.offset + done }))
                }
                offset += run.count
            }
        }
        return sectors
    }

    /// An overlay, longer than its backing image, in which clusters lie in random order.
    private static func makeChain(_ folder: QCOW2TestFolder, seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        for (name, size, more) in [
            ("base.qcow2", "3M", []), ("top.qcow2", "5M", ["-b", "base.qcow2", "-F", "qcow2"]),
        ] {
            try folder.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"] + more
                    + [name, size])
            let clusters = name == "base.qcow2" ? 768 : 1280
            var script: [String] = []
            for _ in 0..<300 {
                let start = Int.random(in: 0..<clusters, using: &random)
                let count = Int.random(in: 1...min(4, clusters - start), using: &random)
                let command = ["write", "write", "write -z", "discard"].randomElement(
                    using: &random)
                script += ["-c", "\(command ?? "write") \(start * 4)k \(count * 4)k"]
            }
            try folder.run(["qemu-io", "-f", "qcow2"] + script + [name])
        }
    }

    @Test(arguments: 1...3)
    func longAnswersSayOfEverySectorWhatSingleRunsDo(seed: Int) async throws {
        let folder = try QCOW2TestFolder()
        try Self.makeChain(folder, seed: UInt64(seed))
        try await folder.open("top.qcow2", writable: false) { edge throws(BlockError) in
            let single = try await Self.sectors(edge, limit: 1)
            #expect(single.count == edge.size / 512, "seed \(seed)")
            for limit in [2, 7, 512] {
                let many = try await Self.sectors(edge, limit: limit)
                #expect(many == single, "seed \(seed), limit \(limit)")
            }
            // Questions that begin and end within clusters.
            let odd = try await Self.sectors(edge, limit: 9, from: 1536, step: 5 * 512)
            #expect(odd == Array(single.dropFirst(3)), "seed \(seed)")
        }
    }

    @Test func aFragmentedImageIsToldInOneAnswer() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "1M",
        ])
        let places = (0..<128).map { $0 * 37 % 128 * 2 }
        try folder.run(
            ["qemu-io", "-f", "qcow2"] + places.flatMap { ["-c", "write \($0 * 4)k 4k"] }
                + ["a.qcow2"])
        let runs = try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            let answer = BlockStatusList(limit: 256)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            return answer.runs.map { [$0.count, $0.flags.contains(.data) ? 1 : 0] }
        }
        #expect(runs.count == 256)
        #expect(runs.enumerated().allSatisfy { $1 == [4096, 1 - $0 % 2] })
    }

    @Test func holesOfTheFileShowWithinAClusterWhateverTheOrder() async throws {
        let folder = try QCOW2TestFolder()
        // All clusters are there; what was not written is a hole of the file.
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "a.qcow2",
            "4M",
        ])
        try folder.run([
            "qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "-c", "write 2M 8k", "a.qcow2",
        ])
        try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            let answer = BlockStatusList(limit: 64)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            var offset = 0
            var data = 0
            for run in answer.runs {
                #expect(run.flags.contains([.data, .allocated]))
                #expect(run.mapping != nil)
                let isZero = run.flags.contains(.zero)
                if !isZero { data += run.count }
                for written in [1 << 20, 1 << 20 + 65_535, 2 << 20, 2 << 20 + 8191]
                where (offset..<offset + run.count).contains(written) {
                    #expect(!isZero, "at \(written)")
                }
                offset += run.count
            }
            #expect(offset == edge.size)
            #expect(data < 256 << 10)
        }
    }

    @Test func aDamagedTableIsMetByWhoAsksFromThere() async throws {
        let folder = try QCOW2TestFolder()
        // Two L2 tables of 64 KiB each; the second one's place is no cluster.
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1G",
        ])
        try folder.run([
            "qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "-c", "write 600M 64k", "a.qcow2",
        ])
        var bytes = try folder.bytes("a.qcow2")
        let table = bytes[40..<48].reduce(0) { $0 << 8 | Int($1) }
        bytes[table + 8 + 6] |= 0x02
        try folder.write(bytes, "a.qcow2")
        let (known, code) = try await folder.open("a.qcow2", writable: false) {
            edge throws(BlockError) in
            let answer = BlockStatusList(limit: 64)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            let known = answer.byteCount
            var code: BlockError.Code?
            do throws(BlockError) {
                try await edge.chainStatus(ByteRange(from: known, to: edge.size), into: answer)
            } catch { code = error.code }
            return (known, code)
        }
        #expect(known == 512 << 20)
        #expect(code != nil)
    }
}
