import BlockCore
import BlockGraph
import Testing

@Suite struct DirtyBitmapTests {
    @Test func changesAreRoundedToTheGranularity() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 4096, size: 100_000)
        bitmap.changed(ByteRange(5000, 1))
        bitmap.changed(ByteRange(99_999, 1))
        var ranges: [ByteRange] = []
        bitmap.forEachDirtyRange { ranges.append($0) }
        #expect(ranges == [ByteRange(4096, 4096), ByteRange(98_304, 1696)])
        #expect(bitmap.dirtyBytes == 8192)
    }

    @Test func aDisabledBitmapRecordsNothing() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 4096)
        bitmap.isEnabled = false
        bitmap.changed(ByteRange(0, 4096))
        #expect(bitmap.dirtyBytes == 0)
    }

    @Test(arguments: [("", 512), ("b", 0), ("b", 511), ("b", 768), ("b", 1 << 32)])
    func badNamesAndGranularitiesAreRefused(name: String, granularity: Int) {
        #expect(throws: BlockError.self) {
            try DirtyBitmap(name: name, granularity: granularity, size: 4096)
        }
    }

    @Test func whatLiesPastItsEndIsPassedOver() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 1000)
        bitmap.changed(ByteRange(999, 5000))
        bitmap.changed(ByteRange(5000, 5000))
        #expect(bitmap.dirtyBytes == 512)
    }

    @Test func clearingTakesWholeUnitsOnly() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 2000)
        bitmap.mark(ByteRange(0, 2000))
        bitmap.clear(ByteRange(1, 1023))
        bitmap.clear(ByteRange(1536, 464))
        var ranges: [ByteRange] = []
        bitmap.forEachDirtyRange { ranges.append($0) }
        #expect(ranges == [ByteRange(0, 512), ByteRange(1024, 512)])
    }

    @Test func mergingRoundsToTheTargetsGranularity() throws {
        let fine = try DirtyBitmap(name: "fine", granularity: 512, size: 10_000)
        let coarse = try DirtyBitmap(name: "coarse", granularity: 4096, size: 10_000)
        fine.mark(ByteRange(5000, 1))
        try coarse.merge(fine)
        #expect(coarse.nextDirtyRange(in: ByteRange(0, 10_000)) == ByteRange(4096, 4096))
        fine.clear()
        try fine.merge(coarse)
        #expect(fine.dirtyBytes == 4096)
    }

    @Test func bitmapsOfDifferentSizesAreNotMerged() throws {
        let one = try DirtyBitmap(name: "one", granularity: 512, size: 10_000)
        let two = try DirtyBitmap(name: "two", granularity: 512, size: 10_001)
        #expect(throws: BlockError.self) { try one.merge(two) }
    }

    @Test func bytesThatAppearAreDirtyWhileItRecords() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 2048)
        bitmap.resize(to: 4096)
        #expect(bitmap.nextDirtyRange(in: ByteRange(0, 4096)) == ByteRange(2048, 2048))
        bitmap.resize(to: 1024)
        bitmap.isEnabled = false
        bitmap.resize(to: 4096)
        #expect(bitmap.dirtyBytes == 0)
    }

    @Test func aSizeThatItCannotCoverLeavesItInconsistent() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 1024)
        bitmap.resize(to: Limits.nodeSizeMax)
        #expect(bitmap.isInconsistent)
        #expect(!bitmap.isRecording)
        bitmap.mark(ByteRange(0, 512))
        bitmap.clear(ByteRange(0, 512))
        #expect(bitmap.nextDirty(in: ByteRange(0, 1024)) == nil)
        #expect(throws: BlockError.self) { try bitmap.check(.inconsistent) }
        #expect(throws: BlockError.self) { try bitmap.merge(bitmap) }
    }

    @Test(arguments: [false, true]) func aSplitKeepsOldAndNewChangesApart(dropping: Bool) throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 2048)
        bitmap.changed(ByteRange(0, 1))
        bitmap.split()
        bitmap.changed(ByteRange(1024, 1))
        #expect(bitmap.nextDirty(in: ByteRange(512, 1536)) == nil)
        #expect(bitmap.contents.setCount == 2)
        bitmap.join(droppingOlder: dropping)
        #expect(bitmap.run(at: 0).isDirty == !dropping)
        #expect(bitmap.run(at: 1024).isDirty)
    }

    @Test func aBusyBitmapNamesItsUser() throws {
        let bitmap = try DirtyBitmap(name: "b", granularity: 512, size: 2048)
        bitmap.hold(for: "NBD export 'e'")
        #expect {
            try bitmap.check()
        } throws: { error in
            "\(error)".contains("NBD export 'e'")
        }
        try bitmap.check([.readOnly, .inconsistent])
        bitmap.release(from: "NBD export 'e'")
        try bitmap.check()
    }
}
