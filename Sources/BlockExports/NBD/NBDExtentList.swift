import BlockCore
import NBDProtocol

/// The extents of a reply to block status, made from runs that go on where the last ended.
///
/// Runs end where storage has them end, in a backing image or at its end say; extents may end only at
/// multiples of the block size that the client was told, and at the end of the question (proto.md, "Block
/// size constraints").
///
/// Invariants:
/// 1. Every extent ends at a multiple of ``alignment`` of the export, or at the end of the question.
/// 2. Of a block with several runs nothing is told that does not hold for all of it.
struct NBDExtentList {
    private(set) var extents: [NBDStatusExtent] = []
    let context: NBDContext
    let alignment: Int
    let countMax: Int
    /// Where the next run begins, and where the question ends.
    private var offset: Int
    private let end: Int
    /// Of the block that the last run ended within: what is known of it, and not told yet.
    private var partCount = 0
    private var partFlags: UInt64 = 0

    /// - Parameters:
    ///   - range: what the client asks about.
    ///   - alignment: a power of two.
    ///   - countMax: of extents.
    init(_ context: NBDContext, of range: ByteRange, alignment: Int, countMax: Int) {
        self.context = context
        self.alignment = alignment
        self.countMax = countMax
        offset = range.offset
        end = range.end
    }

    /// Adds the next run, which ends within the question.
    ///
    /// - Returns: `false` where there is no room for an extent of it: it is the last one then.
    mutating func append(_ count: Int, _ flags: UInt64) -> Bool {
        var left = count
        if partCount > 0 {
            let blockEnd = min(offset.roundedUp(to: alignment) ?? end, end)
            let taken = min(left, blockEnd - offset)
            partFlags = merged(partFlags, flags)
            partCount += taken
            offset += taken
            left -= taken
            if offset < blockEnd { return true }
            guard add(partCount, partFlags) else { return false }
            partCount = 0
        }
        let runEnd = offset + left
        let wholeEnd = runEnd == end ? end : max(offset, runEnd.roundedDown(to: alignment))
        guard add(wholeEnd - offset, flags) else { return false }
        partCount = runEnd - wholeEnd
        partFlags = flags
        offset = runEnd
        return true
    }

    private mutating func add(_ count: Int, _ flags: UInt64) -> Bool {
        if count == 0 { return true }
        if let last = extents.last, last.flags == flags {
            extents[extents.count - 1].count += count
            return true
        }
        if extents.count == countMax { return false }
        extents.append(NBDStatusExtent(count: count, flags: flags))
        return true
    }

    /// What holds for a block with both.
    private func merged(_ one: UInt64, _ other: UInt64) -> UInt64 {
        switch context {
        // Only a block that is a hole, or zeroes, as a whole is one.
        case .baseAllocation: one & other
        // The uppermost layer that has some of it.
        case .allocationDepth: one == 0 || other == 0 ? one | other : min(one, other)
        case .dirtyBitmap: one | other
        }
    }
}
