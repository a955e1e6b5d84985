import BlockCore
import BlockGraph
import Foundation
import QMP
import Testing

@testable import BlockFormats

/// Known holes of qcow2 parsers: each image that opened one is refused, with nothing lost.
@Suite struct QCOW2CatalogueTests {
    struct Hole: Sendable, CustomTestStringConvertible {
        var name: String
        var what: String
        var offset: Int
        var bytes: [UInt8]
        var testDescription: String { "\(name): \(what)" }
    }

    private static let max32: [UInt8] = [0xff, 0xff, 0xff, 0xff]

    static let headers: [Hole] = [
        Hole(
            name: "CVE-2014-0143", what: "an L1 table whose size overflows", offset: 36,
            bytes: max32),
        Hole(
            name: "CVE-2014-0143", what: "an L1 table of 2³¹ − 1 entries", offset: 36,
            bytes: [0x7f, 0xff, 0xff, 0xff]),
        Hole(
            name: "CVE-2014-0144", what: "clusters of 2^32 bytes", offset: 20, bytes: [0, 0, 0, 32]),
        Hole(
            name: "CVE-2014-0144", what: "a backing name that ends past its cluster", offset: 8,
            bytes: [0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 3, 0xff]),
        Hole(
            name: "CVE-2014-0144", what: "a backing name of 4 GiB", offset: 8,
            bytes: [0, 0, 0, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff]),
        Hole(name: "CVE-2014-0144", what: "2³² − 1 snapshots", offset: 60, bytes: max32),
        Hole(
            name: "CVE-2014-0144", what: "refcounts of 2^32 bits", offset: 96, bytes: [0, 0, 0, 32]),
        Hole(
            name: "CVE-2014-0147", what: "a refcount table that overflows", offset: 56, bytes: max32
        ),
        Hole(
            name: "CVE-2014-0147", what: "a refcount table past every file", offset: 48,
            bytes: [0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        Hole(name: "CVE-2014-0142", what: "clusters of one byte", offset: 20, bytes: [0, 0, 0, 0]),
        Hole(
            name: "CVE-2014-0143", what: "a disk of 2⁶⁴ − 1 bytes", offset: 24,
            bytes: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
    ]

    @Test(arguments: headers) func headersThatOpenedAHoleAreRefused(hole: Hole) async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        var bytes = try folder.bytes("a.qcow2")
        bytes.replaceSubrange(hole.offset..<(hole.offset + hole.bytes.count), with: hole.bytes)
        try folder.write(bytes, "a.qcow2")
        for isWritable in [false, true] {
            await #expect(throws: BlockError.self) {
                try await folder.open("a.qcow2", writable: isWritable) { _ in }
            }
        }
        #expect(try folder.bytes("a.qcow2") == bytes)
    }

    @Test(
        "CVE-2014-0145, CVE-2014-0146: snapshots with tables that cannot be are found and dropped")
    func snapshotsWithImpossibleTables() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "10M"])
        try folder.run(["qemu-img", "snapshot", "-c", "one", "a.qcow2"])
        let good = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        let table = Int(good.number(64))
        let faults: [(offset: Int, value: UInt64)] = [
            (table + 8, 0xffff_ffff_0000_0000), (table, 0x8000_0000_0000_0000),
            (table + 36, 0xffff_ffff_ffff_ffff), (table + 12, 0xffff_ffff_ffff_ffff),
            (64, 0x100_0000_0000),
        ]
        for (offset, value) in faults {
            var bytes = good
            bytes.set(offset, value)
            try folder.write(bytes.bytes, "a.qcow2")
            _ = try? await folder.open("a.qcow2") { _ in }
            try folder.write(bytes.bytes, "a.qcow2")
            #expect(try await folder.mendOrCheck("a.qcow2").corruptions > 0)
            _ = try await folder.mendOrCheck("a.qcow2", .all)
            try folder.check("a.qcow2")
        }
    }
}
