import BlockCore
import BlockGraph
import QMP

/// Limits that a blkdebug node pretends to have, in bytes; 0 where it has its child's.
struct DebugLimits {
    var alignment = 0
    var transferMax = 0
    var zeroUnit = 0
    var zeroMax = 0
    var discardUnit = 0
    var discardMax = 0

    /// - Throws: `invalidArgument` for limits that do not fit each other or the child's.
    init(_ options: OptionReader, child: NodeLimits) throws(BlockError) {
        alignment = try options.size("align") ?? 0
        guard alignment == 0 || alignment.isPowerOfTwo, alignment < Int(Int32.max) else {
            throw Self.refused("align", alignment, "must be a power of two")
        }
        let unit = max(alignment, child.requestAlignment)
        transferMax = try Self.size(options, "max-transfer", multipleOf: unit)
        zeroUnit = try Self.size(options, "opt-write-zero", multipleOf: unit)
        zeroMax = try Self.size(options, "max-write-zero", multipleOf: max(zeroUnit, unit))
        discardUnit = try Self.size(options, "opt-discard", multipleOf: unit)
        discardMax = try Self.size(options, "max-discard", multipleOf: max(discardUnit, unit))
    }

    private static func size(
        _ options: OptionReader, _ key: String, multipleOf unit: Int
    ) throws(BlockError) -> Int {
        let value = try options.size(key) ?? 0
        guard value % unit == 0, value < Int(Int32.max) else {
            throw refused(key, value, "must be a multiple of \(unit)")
        }
        return value
    }

    private static func refused(_ key: String, _ value: Int, _ why: String) -> BlockError {
        BlockError(.invalidArgument, "'\(key)' \(why), not \(value)")
    }

    func applied(to child: NodeLimits) -> NodeLimits {
        var limits = child
        limits.requestAlignment = max(limits.requestAlignment, alignment)
        if transferMax > 0 { limits.transferMax = min(limits.transferMax, transferMax) }
        if zeroUnit > 0 { limits.allocationUnit = zeroUnit }
        return limits
    }

    /// Cuts `range` where a node with these limits would: whole units apart from the ends, and no part
    /// longer than `longest`.
    static func parts(_ range: ByteRange, unit: Int, longest: Int) -> [ByteRange] {
        guard unit > 1 || longest > 0 else { return [range] }
        let unit = max(unit, 1)
        var result: [ByteRange] = []
        var offset = range.offset
        while offset < range.end {
            var count = range.end - offset
            let skew = offset % unit
            if skew > 0 {
                count = min(count, unit - skew)
            } else if count > unit {
                count -= count % unit
            }
            if longest > 0 { count = min(count, longest) }
            result.append(ByteRange(offset, count))
            offset += count
        }
        return result
    }
}
