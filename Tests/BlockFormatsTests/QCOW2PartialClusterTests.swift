import BlockCore
import BlockGraph
import BlockIO
import Testing

@testable import BlockFormats

/// Files that end within their last cluster, as QEMU leaves them.
@Suite struct QCOW2PartialClusterTests {
    /// Writes 4 KiB of nines at 10 KiB, and reads them with what is around.
    private static func writeIntoTheLastCluster(
        _ folder: QCOW2TestFolder, expecting before: @escaping @Sendable (Int) -> UInt8
    ) async throws {
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            let data = try IOVector(allocating: 4096)
            data.fill(9)
            try await edge.write(10 << 10, from: data)
        }
        let contents = try await folder.contents("a.qcow2")
        for offset in 0..<65_536 {
            let isWritten = (10 << 10..<14 << 10).contains(offset)
            let expected = isWritten ? 9 : before(offset)
            guard contents[offset] != expected else { continue }
            Issue.record("\(contents[offset]) at \(offset), not \(expected)")
            break
        }
        try folder.check("a.qcow2")
    }

    @Test func subclustersAreWrittenPastTheFilesEnd() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "a.qcow2", "4M",
        ])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -P 71 2k 4k", "a.qcow2"])
        #expect(try folder.bytes("a.qcow2").count % 65_536 != 0)
        try await Self.writeIntoTheLastCluster(folder) { (2 << 10..<6 << 10).contains($0) ? 71 : 0 }
    }

    @Test func allocatedZeroClustersAreWrittenPastTheFilesEnd() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"])
        try folder.run([
            "qemu-io", "-f", "qcow2", "-c", "write -P 71 0 4k", "-c", "write -z 0 64k", "a.qcow2",
        ])
        // What QEMU leaves out of a cluster's end, depending on its version.
        let bytes = try folder.bytes("a.qcow2")
        try folder.write(Array(bytes[..<(bytes.count & ~65_535)]), "a.qcow2")
        try await Self.writeIntoTheLastCluster(folder) { _ in 0 }
    }

    @Test func aLongChainOfImagesOpens() async throws {
        let folder = try QCOW2TestFolder()
        func name(_ index: Int) -> String { "c\(1000 + index).qcow2" }
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", name(0), "1M"])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -P 5 64k 64k", name(0)])
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", name(0), "-F", "qcow2", name(1),
        ])
        let link = try folder.bytes(name(1))
        let place = try #require(link.firstRange(of: Array(name(0).utf8)))
        for index in 2...200 {
            var bytes = link
            bytes.replaceSubrange(place, with: Array(name(index - 1).utf8))
            try folder.write(bytes, name(index))
        }
        let contents = try await folder.contents(name(200))
        #expect(contents[65_535] == 0 && contents[65_536] == 5 && contents[131_071] == 5)
        // One that names itself ends, too.
        var loop = link
        loop.replaceSubrange(place, with: Array(name(1).utf8))
        try folder.write(loop, name(1))
        do {
            _ = try await folder.contents(name(1))
            Issue.record("opened")
        } catch let error as BlockError {
            #expect(!error.message.contains("node options nest"), "\(error)")
        }
    }
}
