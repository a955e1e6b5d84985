import BlockCore
import BlockGraph
import Foundation
import QMP
import Testing

@testable import BlockFormats

/// Random concurrent requests against a model in memory.
final class QCOW2Load: @unchecked Sendable {
    let edge: Edge
    let seed: Int
    var model: [UInt8]
    var wrong: [String] = []
    private var busy: [Range<Int>] = []
    private var running = 0
    private var random: QCOW2TestRandom

    init(_ edge: Edge, seed: Int, model: [UInt8]) {
        self.edge = edge
        self.seed = seed
        self.model = model
        random = QCOW2TestRandom(seed: seed)
    }

    /// Runs requests on disjoint ranges at once, so that each one's outcome is known; they share
    /// clusters all the same.
    func run(steps: Int) async throws(BlockError) {
        let thread = edge.node.thread
        for step in 0..<steps {
            let offset = random.next(below: model.count)
            let wanted = [700, 9_000, 150_000][random.next(below: 3)]
            let count = min(1 + random.next(below: wanted), model.count - offset)
            let range = offset..<(offset + count)
            let kind = random.next(below: 12)
            while running > 12 || busy.contains(where: { $0.overlaps(range) }) {
                await thread.yield()
            }
            busy.append(range)
            running += 1
            thread.spawn {
                do throws(BlockError) {
                    try await self.one(kind, range, UInt8(step % 255 + 1))
                } catch {
                    self.wrong.append("step \(step): \(error)")
                }
                self.busy.removeAll { $0 == range }
                self.running -= 1
            }
        }
        while running > 0 { await thread.yield() }
    }

    private func one(_ kind: Int, _ range: Range<Int>, _ value: UInt8) async throws(BlockError) {
        let bytes = ByteRange(range.lowerBound, range.count)
        switch kind {
        case 0...4:
            let vector = try IOVector(allocating: range.count)
            vector.fill(value)
            try await edge.write(range.lowerBound, from: vector)
            for index in range { model[index] = value }
        case 5, 6:
            try await edge.writeZeroes(bytes, kind == 5 ? [] : .mayUnmap)
            for index in range { model[index] = 0 }
        case 7:
            try await edge.discard(bytes)
            // What a discard leaves is seen by reading; it has to stay.
            let seen = try await read(range)
            for index in range { model[index] = seen[index - range.lowerBound] }
        case 8:
            try await edge.flush()
        default:
            if try await read(range) != Array(model[range]) {
                wrong.append("read \(range) differs from the model")
            }
        }
    }

    private func read(_ range: Range<Int>) async throws(BlockError) -> [UInt8] {
        let vector = try IOVector(allocating: range.count)
        try await edge.read(range.lowerBound, into: vector)
        return vector.array
    }
}

@Suite struct QCOW2LoadTests {
    static let size = 8 << 20

    @Test(arguments: QCOW2Variant.all)
    func concurrentRequestsKeepDataAndMetadata(variant: QCOW2Variant) async throws {
        for seed in 1...2 {
            let folder = try QCOW2TestFolder()
            var model = [UInt8](repeating: 0, count: Self.size)
            if variant.hasBacking {
                let base = QCOW2InteropTests.pattern(3 << 20, seed: seed)
                try folder.write(base, "base.img")
                model.replaceSubrange(0..<base.count, with: base)
            }
            try await folder.create("a.qcow2", variant.options(size: Self.size))
            let start = model
            // Few slices: tables come and go while requests use them.
            let options: JSONValue =
                seed == 2 ? ["l2-cache-size": 1024, "l2-cache-entry-size": 512] : [:]
            let (end, wrong) = try await folder.open("a.qcow2", options: options) {
                edge throws(BlockError) in
                let load = QCOW2Load(edge, seed: seed, model: start)
                try await load.run(steps: 400)
                return (load.model, load.wrong)
            }
            #expect(wrong.isEmpty, "seed \(seed)")
            try folder.check("a.qcow2")
            try folder.write(end, "model.img")
            try folder.run([
                "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "model.img",
            ])
            #expect(try await folder.contents("a.qcow2") == end, "seed \(seed)")
        }
    }

    @Test func smallWritesSideBySideShareClustersWithoutLoss() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2Variant().options(size: 1 << 20))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            final class Count: @unchecked Sendable { var left = 256 }
            let count = Count()
            for index in 0..<256 {
                edge.node.thread.spawn {
                    if let vector = try? IOVector(allocating: 4096) {
                        vector.fill(UInt8(index))
                        try? await edge.write(index * 4096, from: vector)
                    }
                    count.left -= 1
                }
            }
            while count.left > 0 { await edge.node.thread.yield() }
        }
        let contents = try await folder.contents("a.qcow2")
        #expect(contents == (0..<256).flatMap { [UInt8](repeating: UInt8($0), count: 4096) })
        try folder.check("a.qcow2")
    }

    @Test(arguments: [512, 65536]) func imagesGrowAndShrink(clusterSize: Int) async throws {
        let folder = try QCOW2TestFolder()
        try folder.write(QCOW2InteropTests.pattern(3 << 20, seed: 9), "base.img")
        var variant = QCOW2Variant(clusterSize: clusterSize)
        variant.hasBacking = true
        try await folder.create("a.qcow2", variant.options(size: 1 << 20))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await edge.resize(to: 40 << 20)
            let vector = try IOVector(allocating: 100_000)
            vector.fill(5)
            try await edge.write(30 << 20, from: vector)
            try await edge.resize(to: 20 << 20)
            try await edge.resize(to: 50 << 20, clusterSize == 512 ? .metadata : .full)
        }
        try folder.check("a.qcow2")
        let contents = try await folder.contents("a.qcow2")
        #expect(contents.count == 50 << 20)
        #expect(
            Array(contents.prefix(1 << 20)) == Array(try folder.bytes("base.img").prefix(1 << 20)))
        #expect(contents.dropFirst(1 << 20).allSatisfy { $0 == 0 })
    }

    @Test func discardsGiveSpaceBack() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2Variant().options(size: 16 << 20))
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let vector = try IOVector(allocating: 8 << 20)
            vector.fill(1)
            try await edge.write(0, from: vector)
            try await edge.flush()
            try await edge.discard(ByteRange(0, 8 << 20))
            try await edge.flush()
        }
        var status = stat()
        stat(folder["a.qcow2"], &status)
        #expect(Int(status.st_blocks) * 512 < 1 << 20)
        try folder.check("a.qcow2")
    }

    @Test func aCopyTakenAfterAFlushIsCleanButForLeaks() async throws {
        let folder = try QCOW2TestFolder()
        for isLazy in [false, true] {
            try await folder.create(
                "a.qcow2", QCOW2Variant(isLazy: isLazy).options(size: Self.size))
            let copy = folder["copy.qcow2"]
            let original = folder["a.qcow2"]
            let model = try await folder.open("a.qcow2") { edge throws(BlockError) in
                let load = QCOW2Load(
                    edge, seed: 77, model: [UInt8](repeating: 0, count: Self.size))
                try await load.run(steps: 200)
                try await edge.flush()
                try? FileManager.default.removeItem(atPath: copy)
                try? FileManager.default.copyItem(atPath: original, toPath: copy)
                return load.model
            }
            // As after a crash: opening for writing makes it clean again.
            #expect(try await folder.contents("copy.qcow2") == model)
            try await folder.open("copy.qcow2") { _ throws(BlockError) in }
            if isLazy {
                try folder.check("copy.qcow2")
            } else {
                _ = try? folder.run(["qemu-img", "check", "-r", "leaks", "copy.qcow2"])
                try folder.check("copy.qcow2")
            }
            #expect(try await folder.contents("copy.qcow2") == model)
        }
    }

    @Test func dataOverMetadataMarksTheImageCorrupt() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "a.qcow2"])
        // The first data cluster's entry names the header.
        var bytes = try folder.bytes("a.qcow2")
        let header = try QCOW2HeaderTests.parse(bytes)
        let l1 = bytes.withUnsafeBytes { $0.bigEndian(at: header.l1Offset, as: UInt64.self) }
        let l2 = QCOW2.L1Entry(rawValue: l1).offset
        bytes.withUnsafeMutableBytes {
            $0.storeBigEndian(UInt64(header.refcountTableOffset) | 1 << 63, at: l2)
        }
        try folder.write(bytes, "a.qcow2")
        let codes = try await folder.open("a.qcow2") { edge throws(BlockError) in
            var codes: [BlockError.Code] = []
            for offset in [0, 500_000] {
                let vector = try IOVector(allocating: 4096)
                vector.fill(1)
                do throws(BlockError) {
                    try await edge.write(offset, from: vector)
                } catch {
                    codes.append(error.code)
                }
            }
            return codes
        }
        #expect(codes == [.corrupt, .corrupt])
        #expect(try QCOW2HeaderTests.parse(folder.bytes("a.qcow2")).incompatible.contains(.corrupt))
    }
}
