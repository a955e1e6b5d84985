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
}
