import BlockCore
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockGraph

/// A disk whose image has to be told before a bitmap changes, which gives others time.
private final class KeepingDriver: IdleDriver, BitmapStore, @unchecked Sendable {
    private let node: BlockNode
    /// What happens while the image is being told.
    var meanwhile: () -> Void = {}

    init(_ node: BlockNode) {
        self.node = node
        node.size = 65536
        node.awaitsFirstChange = true
    }

    var bitmapStore: (any BitmapStore)? { self }
    func checkStorable(name: String, granularity: Int) throws(BlockError) {}
    func beginChanges() async throws(BlockError) {
        await node.thread.yield()
        meanwhile()
        node.awaitsFirstChange = false
    }
    func removeStored(_ name: String) async throws(BlockError) {}

    static let description = DriverDescription(
        name: "keeping", kind: .format,
        open: { opening throws(BlockError) in KeepingDriver(opening.node) })
}

/// Commands on dirty bitmaps that lose the race against others while the image is being told.
@Suite struct BitmapRaceTests {
    enum Change: CaseIterable { case clear, disable, merge }
    enum Obstacle: CaseIterable {
        case busy, inconsistent, removed

        var code: BlockError.Code {
            switch self {
            case .busy: .busy
            case .inconsistent: .corrupt
            case .removed: .notFound
            }
        }
    }

    @Test(arguments: Change.allCases, Obstacle.allCases)
    func aBitmapThatIsTakenMeanwhileIsNotChanged(change: Change, obstacle: Obstacle) async throws {
        let (code, dirty, isEnabled) = try await withGraph(of: [KeepingDriver.description]) {
            graph throws(BlockError) -> (BlockError.Code?, Int, Bool) in
            let node = try await graph.open(
                ["driver": "keeping", "node-name": "n"], monitorOwned: true)
            let bitmap = try await node.makeDirtyBitmap(
                named: "b", granularity: 4096, persistent: true)
            let source = try await node.makeDirtyBitmap(named: "s", granularity: 4096)
            bitmap.mark(ByteRange(0, 4096))
            source.mark(ByteRange(8192, 4096))
            (node.driver as? KeepingDriver)?.meanwhile = {
                switch obstacle {
                case .busy: bitmap.hold(for: "a test")
                case .inconsistent: bitmap.becomeInconsistent()
                case .removed: node.removeDirtyBitmap(bitmap)
                }
            }
            var code: BlockError.Code?
            do throws(BlockError) {
                switch change {
                case .clear: try await node.clearDirtyBitmap(bitmap)
                case .disable: try await node.setDirtyBitmap(bitmap, enabled: false)
                case .merge: try await node.mergeDirtyBitmaps([source], into: bitmap)
                }
            } catch { code = error.code }
            let result = (code, bitmap.dirtyBytes, bitmap.isEnabled)
            if obstacle == .busy { bitmap.release(from: "a test") }
            try await graph.closeAll()
            return result
        }
        #expect(code == obstacle.code)
        // An inconsistent one says nothing, and records nothing.
        #expect(dirty == (obstacle == .inconsistent ? 0 : 4096))
        #expect(isEnabled == (obstacle != .inconsistent))
    }
}
