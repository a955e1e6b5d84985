import BlockCore
import BlockGraph
import BlockIO
import QMP
import Testing

@testable import BlockProtocols

/// Files that were passed in as open descriptors.
@Suite struct PassedFileTests {
    private static func passing<T: Sendable>(
        isDirect: Bool = false,
        _ body:
            @escaping @Sendable (BlockGraph, _ name: String) async throws(BlockError) -> T
    ) async throws -> T {
        try await FileDriverTests.withDisk { graph, folder throws(BlockError) in
            let passed = try graph.thread.system.open(
                "\(folder)/disk", FileOptions(writable: true, direct: isDirect))
            let set = try graph.descriptorSets.add(passed.rawValue, to: nil, note: nil)
            return try await body(graph, "/dev/fdset/\(set)")
        }
    }

    @Test func twoNodesOnOnePassedFileSeeEachOthersLocks() async throws {
        try await Self.passing { graph, name throws(BlockError) in
            let first = try FileDriverTests.write(try await FileDriverTests.open(graph, "a", name))
            let other = try await FileDriverTests.open(graph, "b", name)
            #expect(throws: BlockError.self) { try FileDriverTests.write(other) }
            // Nor does it drop them when it closes.
            try await graph.remove(other)
            let third = try await FileDriverTests.open(graph, "c", name)
            #expect(throws: BlockError.self) { try FileDriverTests.write(third) }
            try await graph.detach(first)
            try await graph.detach(try FileDriverTests.write(third))
        }
    }

    @Test func locksGoWithTheNodeAlthoughThePassedFileStaysOpen() async throws {
        try await Self.passing { graph, name throws(BlockError) in
            for node in ["a", "b"] {
                let opened = try await FileDriverTests.open(graph, node, name)
                let edge = try FileDriverTests.write(opened)
                try await graph.detach(edge)
                try await graph.remove(opened)
            }
        }
    }

    @Test(arguments: [false, true])
    func directIsWhatTheOptionSaysWhateverThePassedFileIs(isDirect: Bool) async throws {
        let alignment = try await Self.passing(isDirect: !isDirect) {
            graph, name throws(BlockError) in
            let node = try await FileDriverTests.open(
                graph, "a", name, ["cache": ["direct": .bool(isDirect)]])
            let edge = try FileDriverTests.write(node)
            let data = try IOVector(allocating: 100)
            data.fill(7)
            try await edge.write(50, from: data)
            try await edge.read(50, into: data)
            #expect(data.array.allSatisfy { $0 == 7 })
            let alignment = node.limits.requestAlignment
            try await graph.detach(edge)
            return alignment
        }
        #expect((alignment > 1) == isDirect)
    }

    // MARK: Where it may not be opened anew

    @Test func aPassedFileThatCannotBeOpenedAnewIsLentToOneNodeAtATime() async throws {
        try await Self.passing { graph, name throws(BlockError) in
            guard let member = try graph.descriptorSets.find(name, writable: true) else { return }
            let options = FileOptions(writable: true)
            func borrow() async throws(BlockError) -> File {
                try await PassedFile.borrow(member, as: name, options, in: graph)
            }
            let first = try await borrow()
            do throws(BlockError) {
                _ = try await borrow()
                Issue.record("two nodes share an opening")
            } catch { #expect(error.code == .busy && error.message.contains(name)) }
            await first.close()
            await (try await borrow()).close()
        }
    }

    @Test func directIOThatAPassedFileDoesNotHaveIsRefused() async throws {
        try await Self.passing { graph, name throws(BlockError) in
            guard let member = try graph.descriptorSets.find(name, writable: true) else { return }
            do throws(BlockError) {
                _ = try await PassedFile.borrow(
                    member, as: name, FileOptions(writable: true, direct: true), in: graph)
                Issue.record("the page cache would be used")
            } catch { #expect(error.message.contains("cache.direct=on")) }
        }
    }
}
