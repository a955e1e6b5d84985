import BlockCore
import Testing

@testable import BlockIO

@Suite struct StreamWindowTests {
    @Test func aPartIsDroppedWhenTheNextIsComplete() {
        var window = StreamWindow()
        let step = 1 << 20
        var dropped: [ByteRange] = []
        for index in 0..<64 {
            // Neighbours come in any order.
            let place = index ^ 1
            if let range = window.note(ByteRange(place * step, step)) { dropped.append(range) }
        }
        #expect(dropped == (0..<3).map { ByteRange($0 << 24, 1 << 24) })
    }

    @Test func nothingIsDroppedOfALittle() {
        var window = StreamWindow()
        for index in 0..<15 {
            #expect(window.note(ByteRange(index << 20, 1 << 20)) == nil)
        }
        #expect(window.note(ByteRange(0, 0)) == nil)
    }

    @Test func aStreamedFileKeepsItsData() throws {
        let path = "/tmp/merino-stream-\(UInt64.random(in: 0 ... .max))"
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        try thread.runBlocking { () async throws(BlockError) in
            let file = try await File.open(
                path, FileOptions(writable: true, create: true), on: thread)
            file.isStreaming = true
            let vector = try IOVector(allocating: 1 << 20)
            for index in 0..<96 {
                vector.fill(UInt8(index))
                try await file.write(vector, at: index << 20)
            }
            for index in 0..<96 {
                _ = try await file.read(vector, at: index << 20)
                #expect(vector.array.allSatisfy { $0 == UInt8(index) })
            }
            await file.close()
        }
        try thread.runBlocking { () async throws(BlockError) in try thread.system.remove(path) }
    }
}
