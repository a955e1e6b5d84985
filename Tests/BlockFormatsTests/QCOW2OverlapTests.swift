import BlockCore
import BlockGraph
import Foundation
import QMP
import Synchronization
import Testing

@testable import BlockFormats

/// Writes that would destroy the image's own structures are refused, and the image is marked.
@Suite struct QCOW2OverlapTests {
    private static let copied: UInt64 = 1 << 63

    /// An image with data in guest clusters 0 and 1, whose entry of cluster 0 leads to `target`.
    private func image(_ target: (QCOW2Bytes) -> Int) throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        try folder.run(["qemu-io", "-c", "write -P 7 0 128k", "a.qcow2"])
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        bytes.set(bytes.entry(0), UInt64(target(bytes)) | Self.copied)
        try folder.write(bytes.bytes, "a.qcow2")
        return folder
    }

    /// - Returns: how many times the graph was told of a corruption.
    private func write(_ folder: QCOW2TestFolder, _ options: JSONValue = [:]) async throws -> Int {
        let told = Mutex(0)
        return try await folder.open("a.qcow2", options: options) { edge throws(BlockError) in
            edge.node.graph.corruptionObserver = { _, corruption in
                if corruption.isFatal { told.withLock { $0 += 1 } }
            }
            let vector = try IOVector(allocating: 4096)
            vector.fill(1)
            var failures = 0
            // The second one goes to a sound place, and is refused all the same.
            for offset in [0, 65536] {
                do throws(BlockError) {
                    try await edge.write(offset, from: vector)
                } catch  where error.code == .corrupt {
                    failures += 1
                }
            }
            guard failures == 0 || failures == 2 else { return -1 }
            return told.withLock { $0 }
        }
    }

    private static let structures:
        [(name: String, option: String, place: @Sendable (QCOW2Bytes) -> Int)] = [
            ("the L1 table", "active-l1", { $0.l1 }),
            ("the refcount table", "refcount-table", { Int($0.number(48)) }),
            ("an L2 table", "active-l2", { $0.l2 }),
            ("a refcount block", "refcount-block", { Int($0.number(Int($0.number(48)))) }),
        ]

    @Test(arguments: 0..<4) func writesOverAStructureAreRefusedAndTheImageIsMarked(index: Int)
        async throws
    {
        let structure = Self.structures[index]
        let folder = try image(structure.place)
        let before = try folder.bytes("a.qcow2")
        #expect(try await write(folder) == 1, "\(structure.name)")
        let after = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        #expect(after.number(72) == 2, "\(structure.name)")
        #expect(after.bytes[112...] == before[112...], "\(structure.name)")
        await #expect(throws: BlockError.self) { try await self.write(folder) }
        _ = try await folder.mendOrCheck("a.qcow2", .all)
        try folder.check("a.qcow2")
    }

    @Test(arguments: 0..<4) func aSingleStructureCanBeCheckedOrLeftOut(index: Int) async throws {
        let structure = Self.structures[index]
        for isOn in [true, false] {
            let folder = try image(structure.place)
            // Without its check the write destroys the structure: what then fails is not asked.
            let told = try? await write(
                folder,
                [
                    "overlap-check": .object([
                        "template": isOn ? "none" : "all", structure.option: .bool(isOn),
                    ])
                ])
            #expect(isOn ? told == 1 : told != 1, "\(structure.name), \(isOn)")
        }
    }

    /// A new one would go where the header is.
    @Test(arguments: ["cached", "none"])
    func theFirstRefcountBlockIsNeverMadeAnew(template: String) async throws {
        let folder = try image { $0.l2 + 65536 }
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        bytes.set(Int(bytes.number(48)), 0)
        try folder.write(bytes.bytes, "a.qcow2")
        await #expect(throws: BlockError.self) {
            try await folder.open(
                "a.qcow2", options: ["overlap-check": .string(template)]
            ) { edge throws(BlockError) in
                let vector = try IOVector(allocating: 4096)
                vector.fill(1)
                try await edge.write(1 << 20, from: vector)
            }
        }
        let after = try folder.bytes("a.qcow2")
        // All but the incompatible features, where the corrupt bit is.
        #expect(after[..<72] == bytes.bytes[..<72])
        #expect(QCOW2Bytes(bytes: after).number(72) == 2)
        #expect(after[80..<65536] == bytes.bytes[80..<65536])
    }

    @Test func theTemplatesAreWhatTheyAreCalled() throws {
        func read(_ value: JSONValue) throws -> QCOW2OverlapCheck {
            try QCOW2OverlapCheck.read(OptionReader(["overlap-check": value], of: "test"))
        }
        #expect(try read("none") == .none)
        #expect(try read("constant").contains(.bitmapDirectory))
        #expect(try !read("constant").contains(.activeL2))
        #expect(try read("all") == [.cached, .inactiveL2])
        #expect(try read(["template": "cached", "active-l2": "off"]).contains(.activeL2) == false)
        #expect(throws: BlockError.self) { try read("some") }
        #expect(throws: BlockError.self) { try read(["activ-l2": true]) }
    }
}
