import BlockCore
import Testing

@Suite struct IOVectorTests {
    private func vector(_ parts: [[UInt8]]) throws -> IOVector {
        var result = IOVector()
        for part in parts {
            let buffer = try IOBuffer(count: part.count)
            part.withUnsafeBytes { buffer.prefix(part.count).bytes.copyMemory(from: $0) }
            result.append(buffer.prefix(part.count))
        }
        return result
    }

    @Test func sliceCrossesSegments() throws {
        let all = try vector([[1, 2, 3], [4], [5, 6, 7, 8]])
        #expect(all.count == 8)
        #expect(all.slice(2, 4).array == [3, 4, 5, 6])
        #expect(all.slice(8, 0).array == [])
        #expect(all.slice(0, 8).array == [1, 2, 3, 4, 5, 6, 7, 8])
    }

    @Test func copiesBetweenDifferentlyCutVectors() throws {
        let source = try vector([[1, 2], [3, 4, 5], [6]])
        let target = try vector([[0], [0, 0, 0, 0], [0]])
        target.copy(from: source)
        #expect(target.array == [1, 2, 3, 4, 5, 6])
    }

    @Test func zeroDetectionSeesASingleByteAnywhere() throws {
        for count in [1, 63, 64, 65, 4096, 4099] {
            let memory = try IOVector(allocating: count)
            memory.fill(0)
            #expect(memory.isZero)
            for position in [0, count / 3, count / 2, count - 1] {
                memory.fill(0)
                memory.slice(position, 1).fill(1)
                #expect(!memory.isZero, "count \(count), position \(position)")
            }
        }
    }

    @Test func buffersArePageAlignedAndReused() throws {
        for count in [0, 1, 4096, 4097, 1 << 21, (1 << 21) + 1] {
            let buffer = try IOBuffer(count: count)
            #expect(buffer.capacity >= count)
            #expect(Int(bitPattern: buffer.base) % 4096 == 0)
        }
    }

    @Test func tooLargeABufferIsAnError() {
        #expect(throws: BlockError.self) { try IOBuffer(count: Limits.requestBytesMax + 1) }
    }
}
