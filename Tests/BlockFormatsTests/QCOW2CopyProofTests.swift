import BlockCore
import BlockFormats
import BlockGraph
import QMP
import Testing

/// The comparison that `compact` relies on finds what differs.
@Suite struct QCOW2CopyProofTests {
    /// An image with a snapshot and a bitmap, and its copy.
    private func folder() async throws -> QCOW2TestFolder {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "old", "4M"])
        try folder.run(["qemu-io", "-c", "write -P 0x51 0 1M", "old"])
        try folder.run(["qemu-img", "snapshot", "-c", "one", "old"])
        try folder.run(["qemu-io", "-c", "write -P 0x62 0 512k", "old"])
        try folder.run(["qemu-img", "bitmap", "--add", "-g", "512", "old", "dirty"])
        try folder.run(["qemu-io", "-c", "write -P 0x73 1M 3k", "old"])
        try folder.write([], "new")
        let path = folder["new"]
        try await folder.open("old", writable: false) { edge throws(BlockError) in
            let graph = edge.node.graph
            let node = try await graph.open(["driver": "file", "filename": .string(path)])
            let target = try graph.attach(
                NamedUser("test"), to: node,
                Access(uses: [.consistentRead, .write, .resize], shares: .all))
            node.release("opening")
            guard let image = edge.node.driver as? QCOW2Driver else { return }
            #expect(try await image.rewrite(to: target, compresses: false) { _ in })
            try await graph.detach(target)
        }
        return folder
    }

    /// What the comparison says of the copy; `nil` where it is the same.
    private func difference(_ folder: QCOW2TestFolder) async throws -> String? {
        let path = folder["new"]
        return try await folder.open("old", writable: false) { edge throws(BlockError) -> String? in
            let graph = edge.node.graph
            let node = try await graph.open([
                "driver": "qcow2", "read-only": true,
                "file": ["driver": "file", "filename": .string(path)],
            ])
            let copy = try graph.attach(NamedUser("test"), to: node, .read)
            node.release("opening")
            var found: String?
            if let old = edge.node.driver as? QCOW2Driver, let new = node.driver as? QCOW2Driver {
                do throws(BlockError) {
                    try await old.prove(new) { _ in }
                } catch {
                    found = error.message
                }
            }
            try await graph.detach(copy)
            return found
        }
    }

    @Test func aCopyIsTheSame() async throws {
        let folder = try await folder()
        #expect(try await difference(folder) == nil)
        try folder.check("new")
    }

    @Test("a changed byte is found", arguments: [0x51, 0x62, 0x73] as [UInt8])
    func data(_ pattern: UInt8) async throws {
        let folder = try await folder()
        var bytes = try folder.bytes("new")
        let run = [UInt8](repeating: pattern, count: 512)
        let place = try #require(
            Array(stride(from: 0, to: bytes.count, by: 512)).last { start in
                bytes[start..<(start + 512)] == run[...]
            })
        bytes[place + 511] ^= 1
        try folder.write(bytes, "new")
        #expect(try await difference(folder)?.contains("data at") == true)
    }

    @Test func aChangedBitmapIsFound() async throws {
        let folder = try await folder()
        try folder.run(["qemu-img", "bitmap", "--clear", "new", "dirty"])
        #expect(try await difference(folder)?.contains("dirty bitmap 'dirty'") == true)
    }

    @Test func anotherSnapshotIsFound() async throws {
        let folder = try await folder()
        try folder.run(["qemu-img", "snapshot", "-c", "two", "new"])
        #expect(try await difference(folder) != nil)
    }

    @Test func anotherHeaderIsFound() async throws {
        let folder = try await folder()
        try folder.run(["qemu-img", "amend", "-o", "lazy_refcounts=on", "new"])
        #expect(try await difference(folder)?.contains("header") == true)
    }
}
