import BlockCore
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockGraph

/// A disk in memory, enough for graph tests.
final class MemoryDriver: BlockDriver, @unchecked Sendable {
    let node: BlockNode
    var bytes: [UInt8]
    var flushFails = false
    var servesAtOnce = true
    var yieldsInResize = false
    var refuses: Permission = []

    init(_ node: BlockNode, size: Int, alignment: Int) {
        self.node = node
        bytes = [UInt8](repeating: 0, count: size)
        node.size = size
        node.limits.requestAlignment = alignment
    }

    func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        precondition((offset | vector.count).isAligned(to: node.limits.requestAlignment))
        bytes.withUnsafeBytes {
            vector.copy(
                from: UnsafeRawBufferPointer(rebasing: $0[offset..<(offset + vector.count)]))
        }
    }
    func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        precondition((offset | vector.count).isAligned(to: node.limits.requestAlignment))
        // A suspension in the middle: what could interleave, does.
        await node.thread.yield()
        bytes.replaceSubrange(offset..<(offset + vector.count), with: vector.array)
    }
    func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        precondition((offset | vector.count).isAligned(to: node.limits.requestAlignment))
        vector.fill(UInt8(truncatingIfNeeded: offset / 512))
        return servesAtOnce
    }
    func writeNow(_ offset: Int, from vector: IOVector) -> Bool {
        precondition((offset | vector.count).isAligned(to: node.limits.requestAlignment))
        if servesAtOnce {
            bytes.replaceSubrange(offset..<(offset + vector.count), with: vector.array)
        }
        return servesAtOnce
    }
    func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        throw BlockError(.unsupported, "no zeroes")
    }
    func discard(_ range: ByteRange) async throws(BlockError) {
        throw BlockError(.unsupported, "no discard")
    }
    func flush() async throws(BlockError) {
        if flushFails { throw BlockError(.inputOutput, "the flush failed") }
    }
    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        answer.append(BlockStatus([.data], count: range.count))
    }
    func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        if yieldsInResize { await node.thread.yield() }
        bytes = bytes.prefix(size) + [UInt8](repeating: 0, count: max(0, size - bytes.count))
        node.size = size
    }
    func checkAccess(_ access: Access) throws(BlockError) {
        if !access.uses.isDisjoint(with: refuses) {
            throw BlockError(.permissionDenied, "refused")
        }
    }
    var filename: String { "memory" }

    static let description = DriverDescription(
        name: "memory", kind: .storage,
        open: { opening throws(BlockError) in
            MemoryDriver(
                opening.node, size: try opening.options.size("size") ?? 65536,
                alignment: try opening.options.int("align") ?? 1)
        })
    static let overlay = DriverDescription(
        name: "overlay", kind: .format,
        open: { opening throws(BlockError) in
            _ = try await opening.child("file", roles: .image)
            _ = try await opening.child("backing", roles: .cow)
            return MemoryDriver(opening.node, size: 65536, alignment: 1)
        })
}

func withGraph<T: Sendable>(
    _ body: @escaping @Sendable (BlockGraph) async throws(BlockError) -> T
) async throws -> T {
    try await withGraph(of: [MemoryDriver.description, MemoryDriver.overlay], body)
}

extension BlockGraph {
    func memory(_ name: String, align: Int = 1) async throws(BlockError) -> BlockNode {
        try await open(
            ["driver": "memory", "node-name": .string(name), "align": .integer(align)],
            monitorOwned: true)
    }
}

@Suite struct GraphTransactionTests {
    @Test func linksFollowFromRoles() async throws {
        let links = try await withGraph { graph throws(BlockError) in
            _ = try await graph.memory("base")
            let top = try await graph.open(
                [
                    "driver": "overlay", "node-name": "top", "file": ["driver": "memory"],
                    "backing": "base",
                ], monitorOwned: true)
            let before = [top.file?.node.name, top.backing?.node.name]
            let transaction = GraphTransaction(graph)
            if let backing = top.backing { transaction.detach(backing) }
            let during = [top.file?.node.name, top.backing?.node.name]
            transaction.abort()
            return [before, during, [top.file?.node.name, top.backing?.node.name]]
        }
        #expect(links == [["#block001", "base"], ["#block001", nil], ["#block001", "base"]])
    }

    @Test func aConflictNamesBothUsersAndChangesNothing() async throws {
        let message = try await withGraph { graph throws(BlockError) in
            let node = try await graph.memory("disk")
            _ = try graph.attach(
                NamedUser("the writer"), to: node, Access(uses: .write, shares: .consistentRead))
            do throws(BlockError) {
                _ = try graph.attach(
                    NamedUser("another"), to: node, Access(uses: .write, shares: .all))
                return "attached"
            } catch {
                return node.parents.count == 1 ? error.description : "still attached"
            }
        }
        #expect(message.contains("the writer") && message.contains("another"))
        #expect(message.contains("write"))
    }

    @Test func aDriversRefusalUndoesTheWholeTransaction() async throws {
        let counts = try await withGraph { graph throws(BlockError) in
            let first = try await graph.memory("first")
            let second = try await graph.memory("second")
            (second.driver as? MemoryDriver)?.refuses = .write
            let transaction = GraphTransaction(graph)
            _ = try transaction.attach(
                first, to: .user(NamedUser("a")), as: "root",
                access: Access(uses: .write, shares: .all))
            _ = try transaction.attach(
                second, to: .user(NamedUser("b")), as: "root",
                access: Access(uses: .write, shares: .all))
            do throws(BlockError) {
                try transaction.commit()
            } catch {
                return [first.parents.count, second.parents.count, 1]
            }
            return [0, 0, 0]
        }
        #expect(counts == [0, 0, 1])
    }

    @Test func loopsAreRefused() async throws {
        let refused = try await withGraph { graph throws(BlockError) in
            let base = try await graph.memory("base")
            let top = try await graph.open(
                ["driver": "overlay", "node-name": "top", "backing": "base"], monitorOwned: true)
            do throws(BlockError) {
                _ = try GraphTransaction(graph).attach(top, to: .node(base), as: "x")
                return false
            } catch {
                return true
            }
        }
        #expect(refused)
    }

    @Test func nodesLiveAsLongAsTheyAreHeld() async throws {
        let names = try await withGraph { graph throws(BlockError) in
            _ = try await graph.open(
                ["driver": "overlay", "node-name": "top", "file": ["driver": "memory"]],
                monitorOwned: true)
            guard let top = graph.node(named: "top") else { return ["none"] }
            let edge = try graph.attach(NamedUser("export"), to: top, .read)
            do throws(BlockError) { try await graph.remove(top) } catch {
                #expect(error.code == .busy && error.message.contains("export"))
            }
            let during = graph.nodes.map(\.name)
            try await graph.detach(edge)
            try await graph.remove(top)
            return during + ["|"] + graph.nodes.map(\.name)
        }
        #expect(names == ["top", "#block001", "|"])
    }

    @Test func drainWaitsForRequestsAndHoldsNewOnesBack() async throws {
        let events = try await withGraph { graph throws(BlockError) in
            final class Log: @unchecked Sendable { var events: [String] = [] }
            let log = Log()
            let node = try await graph.memory("disk")
            let edge = try graph.attach(
                NamedUser("guest"), to: node, Access(uses: [.write, .consistentRead], shares: .all))
            let data = try IOVector(allocating: 512)
            graph.thread.spawn {
                try? await edge.write(0, from: data)
                log.events.append("first write")
            }
            let section = await graph.beginDrain([node])
            log.events.append("drained")
            graph.thread.spawn {
                try? await edge.write(0, from: data)
                log.events.append("second write")
            }
            await graph.thread.sleep(nanoseconds: 1_000_000)
            log.events.append("undrain")
            graph.endDrain(section)
            await graph.thread.sleep(nanoseconds: 1_000_000)
            return log.events
        }
        #expect(events == ["first write", "drained", "undrain", "second write"])
    }

    @Test func unalignedWritesDoNotLoseEachOther() async throws {
        let bytes = try await withGraph { graph throws(BlockError) in
            let node = try await graph.memory("disk", align: 512)
            let edge = try graph.attach(
                NamedUser("guest"), to: node, Access(uses: [.write, .consistentRead], shares: .all))
            final class Count: @unchecked Sendable { var value = 0 }
            let count = Count()
            for index in 0..<64 {
                graph.thread.spawn {
                    if let data = try? IOVector(allocating: 100) {
                        data.fill(UInt8(index + 1))
                        try? await edge.write(index * 100, from: data)
                    }
                    count.value += 1
                }
            }
            while count.value < 64 { await graph.thread.yield() }
            let all = try IOVector(allocating: 6400)
            try await edge.read(0, into: all)
            return all.array
        }
        #expect(bytes == (0..<64).flatMap { [UInt8](repeating: UInt8($0 + 1), count: 100) })
    }

    @Test func aFailedFlushIsReportedForEver() async throws {
        let failures = try await withGraph { graph throws(BlockError) in
            let node = try await graph.memory("disk")
            let edge = try graph.attach(
                NamedUser("guest"), to: node, Access(uses: .write, shares: .all))
            var failures = 0
            (node.driver as? MemoryDriver)?.flushFails = true
            do throws(BlockError) { try await edge.flush() } catch { failures += 1 }
            (node.driver as? MemoryDriver)?.flushFails = false
            do throws(BlockError) { try await edge.flush() } catch { failures += 1 }
            return failures
        }
        #expect(failures == 2)
    }

    @Test(arguments: [(-1, 1), (65536, 1), (65535, 2), (Int.max, Int.max), (0, -1)])
    func requestsPastTheEndAreRefused(offset: Int, count: Int) async throws {
        let code = try await withGraph { graph throws(BlockError) in
            let node = try await graph.memory("disk")
            let edge = try graph.attach(
                NamedUser("guest"), to: node, Access(uses: [.write, .consistentRead], shares: .all))
            do throws(BlockError) {
                if let range = ByteRange(checking: offset, count: count) {
                    try await edge.writeZeroes(range)
                } else {
                    return BlockError.Code.outOfRange
                }
            } catch {
                return error.code
            }
            return BlockError.Code.busy
        }
        #expect(code == .outOfRange)
    }
}
