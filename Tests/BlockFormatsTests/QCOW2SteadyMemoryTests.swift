import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import QMP
import Testing

/// What is handed to the file below stays what it was until the write has ended.
@Suite struct QCOW2SteadyMemoryTests {
    @Test func memoryDoesNotChangeWhileItIsWritten() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2Variant(clusterSize: 512).options(size: 4 << 20))
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let path = folder["a.qcow2"]
        let (changed, wrong) = try await thread.run {
            () async throws(BlockError) -> ([Int], [String]) in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(
                    BlockProtocols.drivers + BlockFormats.drivers + [Watcher.driver]))
            let node = try await graph.open(
                [
                    "driver": "qcow2", "node-name": "image",
                    "file": [
                        "driver": "watcher", "node-name": "watcher",
                        "file": ["driver": "file", "filename": .string(path)],
                    ],
                ], monitorOwned: true)
            let edge = try graph.attach(
                NamedUser("test"), to: node, Access(uses: [.consistentRead, .write], shares: .all))
            let load = QCOW2Load(edge, seed: 5, model: [UInt8](repeating: 0, count: 4 << 20))
            try await load.run(steps: 300)
            let changed = (node.file?.node.driver as? Watcher)?.changed ?? [-1]
            try await graph.detach(edge)
            try await graph.closeAll()
            return (changed, load.wrong)
        }
        #expect(changed.isEmpty)
        #expect(wrong.isEmpty)
    }

    /// Looks at what it writes once more, a while later.
    private final class Watcher: FilterDriver, @unchecked Sendable {
        let child: Edge
        private let node: BlockNode
        /// Where in the file the memory of a write changed.
        var changed: [Int] = []

        init(_ node: BlockNode, _ child: Edge) {
            self.node = node
            self.child = child
        }

        static let driver = DriverDescription(name: "watcher", kind: .filter) {
            opening throws(BlockError) in
            let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
            opening.node.size = child.size
            return Watcher(opening.node, child)
        }

        func write(
            _ offset: Int, from vector: IOVector, _ flags: WriteFlags
        ) async throws(BlockError) {
            let before = vector.array
            for _ in 0..<8 { await node.thread.yield() }
            try await child.write(offset, from: vector, flags)
            if vector.array != before { changed.append(offset) }
        }
        func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
            try await child.writeZeroes(range, flags)
        }
        func discard(_ range: ByteRange) async throws(BlockError) { try await child.discard(range) }
        func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
            try await child.resize(to: size, preallocation)
        }
    }
}
