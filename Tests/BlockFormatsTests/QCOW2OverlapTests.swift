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

    /// A structure of an image, which a write may not reach.
    struct Structure: Sendable, CustomTestStringConvertible {
        var name: String
        /// Of `overlap-check`.
        var option: String
        /// What QEMU does to the image, before its last write.
        var commands: [[String]] = []
        var place: @Sendable (QCOW2Bytes) -> Int
        var testDescription: String { name }

        var hasBitmap: Bool { option == "bitmap-directory" }
    }

    private static let snapshot = [["qemu-img", "snapshot", "-c", "s", "a.qcow2"]]
    private static let bitmap = [
        // With bits of its own, not all alike.
        ["qemu-img", "bitmap", "--add", "-g", "512", "a.qcow2", "b"]
    ]

    static let structures = [
        Structure(name: "the L1 table", option: "active-l1") { $0.l1 },
        Structure(name: "the refcount table", option: "refcount-table") { $0.offset(48) },
        Structure(name: "an L2 table", option: "active-l2") { $0.l2 },
        Structure(name: "a refcount block", option: "refcount-block") {
            $0.offset($0.offset(48))
        },
        Structure(name: "the snapshot table", option: "snapshot-table", commands: snapshot) {
            $0.offset(64)
        },
        Structure(name: "a snapshot's L1 table", option: "inactive-l1", commands: snapshot) {
            $0.offset($0.offset(64))
        },
        Structure(name: "a snapshot's L2 table", option: "inactive-l2", commands: snapshot) {
            $0.offset($0.offset($0.offset(64)))
        },
        Structure(
            name: "the directory of bitmaps", option: "bitmap-directory", commands: bitmap
        ) { $0.bitmapDirectory ?? 0 },
        Structure(name: "a bitmap's table", option: "bitmap-directory", commands: bitmap) {
            $0.offset($0.bitmapDirectory ?? 0)
        },
    ]

    /// An image with data in guest clusters 0 and 1, whose entry of cluster 0 leads to `target`.
    private func image(
        _ commands: [[String]] = [], _ target: (QCOW2Bytes) -> Int
    ) throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        try folder.run(["qemu-io", "-c", "write -P 7 0 128k", "a.qcow2"])
        for command in commands { try folder.run(command) }
        // What a snapshot shares is the disk's own again.
        try folder.run(["qemu-io", "-c", "write -P 8 0 128k", "a.qcow2"])
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

    @Test(arguments: structures)
    func writesOverAStructureAreRefusedAndTheImageIsMarked(
        structure: Structure
    ) async throws {
        let folder = try image(structure.commands, structure.place)
        let before = try folder.bytes("a.qcow2")
        #expect(try await write(folder, ["overlap-check": "all"]) == 1)
        let after = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        #expect(after.number(72) == 2)
        if structure.hasBitmap {
            // Marked in use before the write was tried, and nothing else.
            #expect(
                try QCOW2BitmapTests.flagsByQEMU(folder, "a.qcow2") == ["b": ["in-use", "auto"]])
        } else {
            #expect(after.bytes[112...] == before[112...])
        }
        await #expect(throws: BlockError.self) { try await self.write(folder) }
        _ = try await folder.mendOrCheck("a.qcow2", .all)
        try folder.check("a.qcow2")
    }

    @Test(arguments: structures) func aSingleStructureCanBeCheckedOrLeftOut(
        structure: Structure
    ) async throws {
        for isOn in [true, false] {
            let folder = try image(structure.commands, structure.place)
            // Without its check the write destroys the structure: what then fails is not asked.
            let told = try? await write(
                folder,
                [
                    "overlap-check": .object([
                        "template": isOn ? "none" : "all", structure.option: .bool(isOn),
                    ])
                ])
            #expect(isOn ? told == 1 : told != 1, "\(isOn)")
        }
    }

    /// Which structures each template looks at, as QEMU's documentation has it.
    @Test(arguments: ["none", "constant", "cached", "all"])
    func aTemplateChecksWhatItIsSaidTo(template: String) async throws {
        let checked: Set<String> =
            switch template {
            case "none": []
            case "constant": ["active-l1", "refcount-table", "snapshot-table", "bitmap-directory"]
            case "cached": Set(Self.structures.map(\.option)).subtracting(["inactive-l2"])
            default: Set(Self.structures.map(\.option))
            }
        for structure in Self.structures {
            let folder = try image(structure.commands, structure.place)
            let told = try? await write(folder, ["overlap-check": .string(template)])
            #expect(
                (told == 1) == checked.contains(structure.option), "\(structure.name)")
        }
    }

    /// The refcounts say that the header is free: what is allocated would go there.
    @Test(arguments: [true, false]) func theHeaderIsNotAllocated(isChecked: Bool) async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        bytes.setCount(0, 0)
        try folder.write(bytes.bytes, "a.qcow2")
        let told = try? await write(
            folder, ["overlap-check": ["template": "none", "main-header": .bool(isChecked)]])
        #expect((told == 1) == isChecked)
        if isChecked {
            let after = try folder.bytes("a.qcow2")
            #expect(after[..<72] == bytes.bytes[..<72])
            #expect(after[80..<65536] == bytes.bytes[80..<65536])
        }
    }

    /// A new one would go where the header is.
    @Test(arguments: ["cached", "none"])
    func theFirstRefcountBlockIsNeverMadeAnew(template: String) async throws {
        let folder = try image([]) { $0.l2 + 65536 }
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
