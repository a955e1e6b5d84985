import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import Foundation
import QMP
import Synchronization
import Testing

@testable import StorageDaemon

/// `BLOCK_IMAGE_CORRUPTED`: an image that turns out to be corrupt is announced, once.
@Suite struct CorruptionEventTests {
    private func run(_ arguments: [String], in folder: String) throws {
        let result = try ChildProgram.run(arguments, in: folder)
        #expect(result.status == 0, "\(result.errors)")
    }

    @Test func anImageFoundCorruptIsAnnouncedOnce() async throws {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let image = folder["a.qcow2"]
        try run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], in: folder.path)
        try run(["qemu-io", "-c", "write 0 128k", image], in: folder.path)
        // The first guest cluster lies in the L1 table.
        let file = try #require(FileHandle(forUpdatingAtPath: image))
        try file.seek(toOffset: 0x40000)
        try file.write(contentsOf: Data([0x80, 0, 0, 0, 0, 3, 0, 0]))
        try file.close()

        let events = Mutex<[JSONValue]>([])
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        try await thread.run { () async throws(BlockError) in
            let daemon = StorageDaemon(on: thread)
            daemon.emit = { name, data in
                if name == "BLOCK_IMAGE_CORRUPTED" { events.withLock { $0.append(data) } }
            }
            let node = try await daemon.graph.open(
                [
                    "driver": "qcow2", "node-name": "disk",
                    "file": ["driver": "file", "filename": .string(image)],
                ], monitorOwned: true)
            let edge = try daemon.graph.attach(
                NamedUser("test"), to: node,
                Access(uses: [.consistentRead, .write], shares: .all))
            let vector = try IOVector(allocating: 512)
            vector.fill(1)
            for offset in [0, 65536] { try? await edge.write(offset, from: vector) }
            try await daemon.graph.detach(edge)
            try await daemon.close()
        }
        let told = events.withLock { $0 }
        #expect(told.count == 1)
        #expect(told.first?["node-name"] == "disk" && told.first?["device"] == "")
        #expect(told.first?["fatal"] == true && told.first?["offset"] == .integer(0x30000))
    }
}
