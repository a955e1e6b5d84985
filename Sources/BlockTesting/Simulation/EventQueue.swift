/// What a simulated machine will do, by its clock. Things of the same time happen in the order in
/// which they were put in.
struct EventQueue {
    private struct Entry {
        let time: UInt64
        let action: () -> Void
    }
    /// The soonest last.
    private var entries: [Entry] = []

    var nextTime: UInt64? { entries.last?.time }
    var isEmpty: Bool { entries.isEmpty }

    mutating func add(at time: UInt64, _ action: @escaping () -> Void) {
        var low = 0
        var high = entries.count
        while low < high {
            let middle = (low + high) / 2
            if entries[middle].time > time { low = middle + 1 } else { high = middle }
        }
        entries.insert(Entry(time: time, action: action), at: low)
    }

    /// Takes out the next thing to do, if its time has come.
    mutating func next(until time: UInt64) -> (() -> Void)? {
        guard let last = entries.last, last.time <= time else { return nil }
        return entries.removeLast().action
    }

    mutating func removeAll() {
        entries = []
    }
}
