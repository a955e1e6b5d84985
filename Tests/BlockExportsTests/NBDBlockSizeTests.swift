import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import NBDProtocol
import Testing

@testable import BlockExports

/// A disk that takes requests in blocks of 4 KiB, and whose size is a number of sectors only.
private final class BlocksDriver: IdleDriver, @unchecked Sendable {
    init(_ node: BlockNode) {
        node.size = (1 << 20) + 512
        node.limits.requestAlignment = 4_096
    }

    static let description = DriverDescription(
        name: "blocks", kind: .storage,
        open: { opening throws(BlockError) in BlocksDriver(opening.node) })
}

/// The blocks that clients are told of, and what keeps to them.
@Suite struct NBDBlockSizeTests {
    @Test(arguments: [
        (4_096, 1 << 20, 4_096), (4_096, (1 << 20) + 512, 512), (4_096, (1 << 20) + 1, 1),
        (512, 513, 1), (4_096, 1, 1), (512, 1 << 20, 512), (4_096, 0, 4_096), (1, 4_096, 1),
        (4_096, 2_048, 2_048), (4_096, Int.max, 1),
    ])
    func anExportIsAWholeNumberOfBlocks(alignment: Int, size: Int, blockSize: Int) {
        #expect(NBDExport.blockSize(alignment: alignment, size: size) == blockSize)
    }

    private static func extents(
        _ context: NBDContext, _ range: ByteRange, countMax: Int = 100, _ runs: [(Int, UInt64)]
    ) -> [NBDStatusExtent] {
        var list = NBDExtentList(context, of: range, alignment: 4_096, countMax: countMax)
        for (count, flags) in runs where !list.append(count, flags) { break }
        return list.extents
    }

    @Test func runsThatEndWithinBlocksAreToldInBlocks() {
        let runs: [(Int, UInt64)] = [
            (8_192 + 512, 0), (512, 3), (16_384 - 1_024, 3), (100, 1), (200, 3), (4_096 - 300, 1),
            (512, 3),
        ]
        let expected = [
            NBDStatusExtent(count: 12_288, flags: 0), NBDStatusExtent(count: 12_288, flags: 3),
            NBDStatusExtent(count: 4_096, flags: 1), NBDStatusExtent(count: 512, flags: 3),
        ]
        let count = runs.reduce(0) { $0 + $1.0 }
        #expect(Self.extents(.baseAllocation, ByteRange(4_096, count), runs) == expected)
    }

    @Test func aBlockIsAsDeepAsItsUppermostPart() {
        let runs: [(Int, UInt64)] = [(512, 0), (1_024, 3), (512, 2), (2_048, 0), (4_096, 0)]
        #expect(
            Self.extents(.allocationDepth, ByteRange(0, 8_192), runs) == [
                NBDStatusExtent(count: 4_096, flags: 2), NBDStatusExtent(count: 4_096, flags: 0),
            ])
    }

    @Test func aQuestionThatBeginsWithinABlockIsAnsweredUpToBlocks() {
        let runs: [(Int, UInt64)] = [(96, 0), (5_000, 3)]
        #expect(
            Self.extents(.baseAllocation, ByteRange(100, 5_096), runs) == [
                NBDStatusExtent(count: 3_996, flags: 0), NBDStatusExtent(count: 1_100, flags: 3),
            ])
    }

    @Test func extentsPastTheLimitAreLeftOut() {
        let runs: [(Int, UInt64)] = [(4_096, 0), (4_096, 3), (4_096, 0)]
        for countMax in 1...3 {
            let extents = Self.extents(
                .baseAllocation, ByteRange(0, 12_288), countMax: countMax, runs)
            #expect(extents.count == countMax)
        }
    }

    /// The reply to a block status of the first 4 KiB for the context 1.
    private static let bitmapReply: [UInt8] =
        [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5] + RawClient.bigEndian(UInt64(1)) + [0, 0, 0, 28]
        + [0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 12, 0, 0, 0, 0, 0]

    @Test func dirtyBitmapsAreToldInTheBlocksThatWereAnnounced() async throws {
        let received = try await Simulation(seed: 3).run { thread throws(BlockError) -> [UInt8] in
            let graph = BlockGraph(on: thread, registry: DriverRegistry([BlocksDriver.description]))
            let node = try await graph.open(
                ["driver": "blocks", "node-name": "disk"], monitorOwned: true)
            let bitmap = try await node.makeDirtyBitmap(named: "b", granularity: 512)
            bitmap.mark(ByteRange(512, 512))
            let server = NBDServer(on: thread)
            let export = try NBDExport(
                name: "disk", node: node, writable: true, bitmaps: [.init(bitmap, of: node)])
            #expect(export.info?.blockSizes.minimum == 512)
            try server.add(export)
            server.listen(on: try Listener(on: .unix(path: "/s"), thread: thread))
            let client = try await Socket.connect(to: .unix(path: "/s"), on: thread)
            let bytes =
                RawClient.flags + RawClient.option(8)
                + RawClient.contexts("disk", ["qemu:dirty-bitmap:b"]) + RawClient.go("disk")
                + RawClient.request(7, 0, 4_096) + RawClient.request(2, 0, 0)
            let memory = try IOVector(allocating: bytes.count)
            bytes.withUnsafeBytes { memory.copy(from: $0) }
            try await client.send(memory)
            var received: [UInt8] = []
            let room = try IOVector(allocating: 4_096)
            while true {
                let count = try await client.receive(room)
                if count == 0 { break }
                received += room.array[..<count]
            }
            client.close()
            try await server.stop()
            try await graph.closeAll()
            return received
        }
        #expect(received.suffix(Self.bitmapReply.count).elementsEqual(Self.bitmapReply))
    }
}
