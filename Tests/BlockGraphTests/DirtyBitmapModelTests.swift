import BlockCore
import BlockGraph
import BlockTesting
import Testing

/// Dirty bitmaps against a plain list of units.
@Suite struct DirtyBitmapModelTests {
    /// What a bitmap should hold.
    private struct Model {
        let granularity: Int
        var size: Int
        var units: [Bool]
        var newer: [Bool]?
        var isEnabled = true

        init(granularity: Int, size: Int) {
            self.granularity = granularity
            self.size = size
            units = [Bool](repeating: false, count: Self.count(size, granularity))
        }

        static func count(_ size: Int, _ granularity: Int) -> Int {
            (size + granularity - 1) / granularity
        }

        func touched(_ range: ByteRange) -> [Int] {
            units.indices.filter { index in
                let start = index * granularity
                return !range.isEmpty && range.offset < min(start + granularity, size)
                    && start < range.end
            }
        }

        mutating func mark(_ range: ByteRange) {
            for index in touched(range) { units[index] = true }
        }

        mutating func change(_ range: ByteRange) {
            guard isEnabled else { return }
            if newer == nil { return mark(range) }
            for index in touched(range) { newer?[index] = true }
        }

        mutating func clear(_ range: ByteRange) {
            for index in units.indices {
                let start = index * granularity
                if range.offset <= start, min(start + granularity, size) <= range.end {
                    units[index] = false
                }
            }
        }

        mutating func resize(to new: Int) {
            let count = Self.count(new, granularity)
            func resized(_ old: [Bool]) -> [Bool] {
                (0..<count).map { $0 < old.count && old[$0] }
            }
            units = resized(units)
            newer = newer.map(resized)
            let old = size
            size = new
            if new > old { change(ByteRange(from: old, to: new)) }
        }
    }

    @Test(arguments: 1...40) func agreesWithAListOfUnits(seed: UInt64) throws {
        var generator = SeededRandom(seed: seed)
        let granularity = 512 << Int.random(in: 0...5, using: &generator)
        let sizeMax = granularity * 500
        let size = Int.random(in: 1...sizeMax, using: &generator)
        let bitmap = try DirtyBitmap(name: "b", granularity: granularity, size: size)
        var model = Model(granularity: granularity, size: size)
        for step in 0..<300 {
            try change(bitmap, &model, sizeMax, &generator)
            #expect(
                question(bitmap, model, &generator), "seed \(seed), step \(step)")
        }
        var found = [Bool](repeating: false, count: model.units.count)
        bitmap.forEachDirtyRange { range in
            for index in model.touched(range) { found[index] = true }
        }
        #expect(found == model.units, "seed \(seed)")
        #expect(bitmap.dirtyBytes == model.units.count { $0 } * granularity, "seed \(seed)")
    }

    private func range(_ size: Int, _ generator: inout SeededRandom) -> ByteRange {
        let offset = Int.random(in: 0...size + 1000, using: &generator)
        return ByteRange(offset, Int.random(in: 0...size / 4 + 2, using: &generator))
    }

    private func change(
        _ bitmap: DirtyBitmap, _ model: inout Model, _ sizeMax: Int, _ generator: inout SeededRandom
    ) throws {
        let range = range(model.size, &generator)
        switch Int.random(in: 0..<12, using: &generator) {
        case 0...3:
            bitmap.changed(range)
            model.change(range)
        case 4:
            bitmap.mark(range)
            model.mark(range)
        case 5, 6:
            bitmap.clear(range)
            model.clear(range)
        case 7:
            bitmap.isEnabled.toggle()
            model.isEnabled.toggle()
        case 8:
            let size = Int.random(in: 1...sizeMax, using: &generator)
            bitmap.resize(to: size)
            model.resize(to: size)
        case 9:
            guard model.newer == nil else { return }
            bitmap.split()
            model.newer = [Bool](repeating: false, count: model.units.count)
        case 10:
            let drops = Bool.random(using: &generator)
            bitmap.join(droppingOlder: drops)
            if let newer = model.newer {
                model.units = zip(model.units, newer).map { ($0 && !drops) || $1 }
                model.newer = nil
            }
        default:
            let unit = 512 << Int.random(in: 0...7, using: &generator)
            let other = try DirtyBitmap(name: "other", granularity: unit, size: model.size)
            var otherModel = Model(granularity: unit, size: model.size)
            other.mark(range)
            otherModel.mark(range)
            try bitmap.merge(other)
            for (index, isDirty) in otherModel.units.enumerated() where isDirty {
                model.mark(ByteRange(index * unit, min(unit, model.size - index * unit)))
            }
        }
    }

    /// One question of each kind; whether all answers are right.
    private func question(
        _ bitmap: DirtyBitmap, _ model: Model, _ generator: inout SeededRandom
    ) -> Bool {
        let asked = range(model.size, &generator)
        let touched = model.touched(asked)
        let granularity = model.granularity
        let dirty = touched.first { model.units[$0] }
        let clean = touched.first { !model.units[$0] }
        guard bitmap.nextDirty(in: asked) == dirty.map({ max($0 * granularity, asked.offset) }),
            bitmap.nextClean(in: asked) == clean.map({ max($0 * granularity, asked.offset) })
        else { return false }
        if let dirty {
            let end = touched.first { $0 > dirty && !model.units[$0] }
            let last = end.map { $0 * granularity } ?? min(asked.end, model.size)
            let run = ByteRange(from: max(dirty * granularity, asked.offset), to: last)
            guard bitmap.nextDirtyRange(in: asked) == run else { return false }
        }
        let offset = Int.random(in: 0..<model.size, using: &generator)
        let unit = offset / granularity
        let end = model.units[unit...].firstIndex { $0 != model.units[unit] }
        let run = bitmap.run(at: offset)
        return run.isDirty == model.units[unit]
            && run.end == end.map { $0 * granularity } ?? model.size
    }
}
