import BlockCore
import BlockTesting
import Testing

@Suite struct ShadowDiskTests {
    private func values(_ disk: ShadowDisk, _ range: Range<Int>) -> [[Int]] {
        range.map { offset in
            (0...255).filter { disk.legalValues(at: offset).contains(UInt8($0)) }
        }
    }

    @Test func aWriteInFlightLeavesBothValuesLegal() {
        let disk = ShadowDisk(size: 4)
        let write = disk.beginWrite(1, [7, 8])
        #expect(values(disk, 0..<4) == [[0], [0, 7], [0, 8], [0]])
        disk.end(write, succeeded: true)
        #expect(values(disk, 0..<4) == [[0], [7], [8], [0]])
    }

    @Test func aFailedWriteLeavesBothValuesUntilOneIsRead() {
        let disk = ShadowDisk(size: 2)
        disk.end(disk.beginWrite(0, [7, 7]), succeeded: false)
        #expect(values(disk, 0..<2) == [[0, 7], [0, 7]])
        let read = disk.beginRead(ByteRange(0, 2))
        #expect(disk.endRead(read, [7, 0]) == nil)
        #expect(values(disk, 0..<2) == [[7], [0]])
        #expect(disk.endRead(disk.beginRead(ByteRange(0, 1)), [0]) != nil)
    }

    @Test func ofOverlappingWritesEitherMayWinButNotTheOldValue() {
        let disk = ShadowDisk(size: 3)
        let first = disk.beginWrite(0, [1, 1])
        let second = disk.beginWrite(1, [2, 2])
        disk.end(first, succeeded: true)
        #expect(values(disk, 0..<3) == [[1], [1, 2], [0, 2]])
        // It began after the first had ended: only the second may come after it.
        let third = disk.beginWrite(1, [3])
        disk.end(third, succeeded: true)
        #expect(values(disk, 1..<2) == [[2, 3]])
        disk.end(second, succeeded: true)
        #expect(values(disk, 0..<3) == [[1], [2, 3], [2]])
    }

    @Test func aReadBesideAWriteSeesEitherAndPinsNothing() {
        let disk = ShadowDisk(size: 1)
        let read = disk.beginRead(ByteRange(0, 1))
        let write = disk.beginWrite(0, [5])
        disk.end(write, succeeded: true)
        #expect(disk.endRead(read, [0]) == nil)
        #expect(values(disk, 0..<1) == [[5]])
        let other = disk.beginRead(ByteRange(0, 1))
        #expect(disk.endRead(other, [0]) == "byte 0 read as 0, legal: {5} (in a read of 0+1)")
    }

    @Test func aFlushMakesDurableWhatWasFinishedWhenItBegan() {
        let disk = ShadowDisk(size: 2)
        disk.end(disk.beginWrite(0, [1]), succeeded: true)
        let late = disk.beginWrite(1, [2])
        let flush = disk.beginFlush()
        disk.end(late, succeeded: true)
        disk.endFlush(flush, succeeded: true)
        #expect(disk.survivingValues(at: 0) == ByteSet(1))
        #expect(disk.survivingValues(at: 1) == ByteSet(0).union(ByteSet(2)))
        disk.crash()
        #expect(values(disk, 0..<2) == [[1], [0, 2]])
    }

    @Test func afterACrashAnyUnflushedWriteMayBeThere() {
        let disk = ShadowDisk(size: 1)
        disk.end(disk.beginWrite(0, [1]), succeeded: true)
        disk.end(disk.beginWrite(0, [2]), succeeded: true)
        disk.endFlush(disk.beginFlush(), succeeded: false)
        disk.crash()
        #expect(values(disk, 0..<1) == [[0, 1, 2]])
    }

    @Test func aDurableWriteIsThereAfterACrash() {
        let disk = ShadowDisk(size: 1)
        disk.end(disk.beginWrite(0, [1]), succeeded: true)
        disk.end(disk.beginWrite(0, [2], durable: true), succeeded: true)
        disk.crash()
        #expect(values(disk, 0..<1) == [[2]])
    }

    @Test func aDiscardLeavesTheValueOrZero() {
        let disk = ShadowDisk(size: 1, value: 9)
        disk.end(disk.beginDiscard(ByteRange(0, 1)), succeeded: true)
        #expect(values(disk, 0..<1) == [[0, 9]])
        disk.end(disk.beginZeroes(ByteRange(0, 1)), succeeded: true)
        #expect(values(disk, 0..<1) == [[0]])
    }
}
