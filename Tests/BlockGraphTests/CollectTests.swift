import BlockCore
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockGraph

/// A disk whose closing takes a turn of the thread, or more, and may fail.
private final class ClosingDriver: IdleDriver, @unchecked Sendable {
    private let node: BlockNode
    private let closeFails: Bool

    init(_ node: BlockNode, closeFails: Bool) {
        self.node = node
        self.closeFails = closeFails
        node.size = 65536
    }

    func close() async throws(BlockError) {
        for _ in 0..<3 { await node.thread.yield() }
        if closeFails { throw BlockError(.inputOutput, "the close failed") }
    }

    static let description = DriverDescription(
        name: "closing", kind: .format,
        open: { opening throws(BlockError) in
            let fails = try opening.options.bool("fails") ?? false
            for name in ["a", "b"] { _ = try await opening.child(name, roles: .data) }
            return ClosingDriver(opening.node, closeFails: fails)
        })
}

/// Who closes nodes, and who is told how it went.
@Suite struct CollectTests {
    private static func withNodes<T: Sendable>(
        _ body: @escaping @Sendable (BlockGraph) async throws(BlockError) -> T
    ) async throws -> T {
        try await withGraph(of: [ClosingDriver.description, MemoryDriver.description], body)
    }

    @Test func whoRemovesANodeIsToldOfItsChildrenWhateverElseIsClosedMeanwhile() async throws {
        let codes = try await Self.withNodes { graph throws(BlockError) in
            let node = try await graph.open(
                [
                    "driver": "closing", "node-name": "top", "a": ["driver": "closing"],
                    "b": ["driver": "closing", "fails": true],
                ], monitorOwned: true)
            // Fails to open, again and again, and closes what it opened on the way.
            let other = graph.thread.spawn {
                for _ in 0..<8 {
                    _ = try? await graph.open(["driver": "closing", "nonsense": true])
                }
            }
            var codes: [BlockError.Code?] = [nil]
            do throws(BlockError) { try await graph.remove(node) } catch { codes = [error.code] }
            #expect(graph.nodes.allSatisfy { $0.name != "top" && $0.isReady == false })
            await other.value
            #expect(graph.nodes.isEmpty)
            return codes
        }
        #expect(codes == [.inputOutput])
    }

    @Test func aNodeThatDoesNotOpenLeavesNothingAndClosesNothingElse() async throws {
        try await Self.withNodes { graph throws(BlockError) in
            let unheld = try await graph.open(["driver": "closing", "fails": true])
            unheld.release("opening")
            do throws(BlockError) {
                _ = try await graph.open(
                    ["driver": "closing", "a": ["driver": "closing"], "nonsense": true])
                Issue.record("it opened")
            } catch { #expect(error.code == .invalidArgument) }
            #expect(graph.nodes.map(\.name) == [unheld.name])
            do throws(BlockError) {
                try await graph.collect()
                Issue.record("nobody was told of the failure")
            } catch { #expect(error.code == .inputOutput) }
        }
    }

    @Test func aTargetThatACreationCannotUseIsClosedAgain() async throws {
        try await Self.withNodes { graph throws(BlockError) in
            let options: JSONValue = ["file": ["driver": "memory", "read-only": true]]
            let creation = ImageCreation(graph, options: try OptionReader(options, of: "test"))
            do throws(BlockError) {
                _ = try await creation.target("file")
                Issue.record("it is used")
            } catch { #expect(error.code == .readOnly) }
            #expect(graph.nodes.isEmpty)
            try await creation.finish()
        }
    }
}
