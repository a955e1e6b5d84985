import BlockCore
import BlockGraph
import BlockIO
import Testing

/// Zeroes that are written while nothing is below, and a backing image that shows later.
@Suite struct QCOW2ZeroTests {
    static let size = 4 << 20
    static let base = [UInt8](repeating: 7, count: size)
    /// Whole clusters, two parts of clusters that nobody wrote to, a part of one that has data.
    static let zeroes = [0..<262_144, 300_000..<304_096, 393_216..<400_000, 526_000..<527_000]
    /// Whole clusters, zeroed when there is no L2 table yet.
    static let unmapped = 2 << 20..<3 << 20
    /// Nobody touches these.
    static let left = [655_360..<2 << 20, 3 << 20..<size]

    /// Zeroes the ranges in an image that is open without a backing image.
    private static func zero(_ folder: QCOW2TestFolder) async throws {
        try await folder.open("a.qcow2", options: ["backing": .null]) { edge throws(BlockError) in
            try await edge.writeZeroes(
                ByteRange(from: unmapped.lowerBound, to: unmapped.upperBound), .mayUnmap)
            try await QCOW2SnapshotTests.fill(edge, 524_288..<530_000, 5)
            for range in zeroes {
                try await edge.writeZeroes(ByteRange(from: range.lowerBound, to: range.upperBound))
            }
        }
    }

    private static func expectZeroes(_ folder: QCOW2TestFolder) async throws {
        let contents = try await folder.contents("a.qcow2")
        for range in zeroes + [unmapped] {
            #expect(contents[range].allSatisfy { $0 == 0 }, "\(range)")
        }
        for range in left { #expect(contents[range].allSatisfy { $0 == 7 }, "\(range)") }
        try folder.check("a.qcow2")
    }

    @Test(arguments: ["compat=1.1", "extended_l2=on", "compat=0.10"])
    func zeroesWrittenWhileTheBackingFileWasLeftOutHideIt(option: String) async throws {
        let folder = try QCOW2TestFolder()
        try folder.write(Self.base, "base.img")
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", option, "-b", "base.img", "-F", "raw",
            "a.qcow2",
        ])
        try await Self.zero(folder)
        try await Self.expectZeroes(folder)
    }

    @Test(arguments: ["compat=1.1", "extended_l2=on"])
    func zeroesHideABackingFileThatIsNamedLater(option: String) async throws {
        let folder = try QCOW2TestFolder()
        try folder.write(Self.base, "base.img")
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", option, "a.qcow2", "\(Self.size)",
        ])
        try await Self.zero(folder)
        try folder.run(["qemu-img", "rebase", "-u", "-b", "base.img", "-F", "raw", "a.qcow2"])
        try await Self.expectZeroes(folder)
    }

    @Test func discardsWhereThereIsNothingTakeNoSpace() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "64G"])
        let before = try folder.bytes("a.qcow2").count
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await edge.discard(ByteRange(0, edge.size))
        }
        #expect(try folder.bytes("a.qcow2").count == before)
    }

    @Test func othersHaveTheirTurnWhileALargeRangeIsDiscarded() async throws {
        let folder = try QCOW2TestFolder()
        var variant = QCOW2Variant(clusterSize: 512)
        variant.preallocation = "metadata"
        try await folder.create("a.qcow2", variant.options(size: 16 << 20))
        let turns = try await folder.open("a.qcow2") { edge throws(BlockError) in
            final class State: @unchecked Sendable {
                var turns = 0
                var isOver = false
            }
            let state = State()
            let thread = edge.node.thread
            try await edge.discard(ByteRange(0, edge.size))
            try await edge.flush()
            // All tables are in memory now, and nothing is left to change: 512 slices are gone through.
            thread.spawn {
                while !state.isOver {
                    state.turns += 1
                    await thread.yield()
                }
            }
            try await edge.discard(ByteRange(0, edge.size))
            state.isOver = true
            return state.turns
        }
        #expect(turns >= 16)
    }
}
