import BlockCore

/// The writes in flight on one node, to keep overlapping ones apart where that matters.
///
/// Of two requests that overlap, where one is serialising, the one that came later waits until the other has
/// left. It hangs on that other one, the newest if there are several, so that of a pile of requests on one block
/// each wakes the next and nobody else.
///
/// Requests stand in lists by their size and place, newest first: a search looks at those in the neighbourhood,
/// however many there are elsewhere.
struct RequestTracker {
    /// A request in flight: until it leaves.
    struct Request: Equatable {
        fileprivate let slot: Int32
    }

    private struct Entry {
        var range: ByteRange
        var isSerialising: Bool
        /// Grows from request to request.
        var number: UInt64
        var list: Int
        /// Its neighbours in the list.
        var newer = RequestTracker.none
        var older = RequestTracker.none
        /// Requests that wait until this one leaves.
        var sleepers: [UnsafeContinuation<Void, Never>] = []
    }

    private static let none: Int32 = -1
    /// Requests of up to 64 KiB, 4 MiB and 256 MiB stand in zones of that size, longer ones all in one. Each
    /// begins in its zone and ends there or in the next.
    private static let zoneShifts = [16, 22, 28, Int.bitWidth - 2]
    private static let listCount = 256

    private var entries: [Entry] = []
    private var free: [Int32] = []
    /// The newest request of each list; zones share lists.
    private var newest: [Int32] = []
    private var countsBySize = [0, 0, 0, 0]
    private var serialisingCount = 0
    private var lastNumber: UInt64 = 0

    /// A write that is over before anything else happens needs no entry, as long as nobody serialises.
    var allowsImmediateWrites: Bool { serialisingCount == 0 }

    /// Enters a request, which begins when it has no ``obstacle(of:)``.
    mutating func enter(_ range: ByteRange, serialising: Bool) -> Request {
        if newest.isEmpty {
            newest = [Int32](repeating: Self.none, count: Self.listCount)
        }
        lastNumber += 1
        let size = Self.sizeClass(of: range)
        let list = Self.list(size, zone: range.offset >> Self.zoneShifts[size])
        var entry = Entry(
            range: range, isSerialising: serialising, number: lastNumber, list: list)
        entry.older = newest[list]
        let slot: Int32
        if let reused = free.popLast() {
            slot = reused
            entries[Int(slot)] = entry
        } else {
            slot = Int32(entries.count)
            entries.append(entry)
        }
        if entry.older != Self.none { entries[Int(entry.older)].newer = slot }
        newest[list] = slot
        countsBySize[size] += 1
        if serialising { serialisingCount += 1 }
        return Request(slot: slot)
    }

    /// The newest of the requests that `request` has to wait for.
    func obstacle(of request: Request) -> Request? {
        if serialisingCount == 0 { return nil }
        let entry = entries[Int(request.slot)]
        var found = Self.none
        for size in Self.zoneShifts.indices where countsBySize[size] > 0 {
            let shift = Self.zoneShifts[size]
            let first = max((entry.range.offset >> shift) - 1, 0)
            let last = max(entry.range.end - 1, entry.range.offset) >> shift
            guard last - first < Self.listCount else {
                for list in newest.indices { search(list, entry, &found) }
                break
            }
            for zone in first...last { search(Self.list(size, zone: zone), entry, &found) }
        }
        return found == Self.none ? nil : Request(slot: found)
    }

    /// Looks in a list for a request that came before `entry`, after `found`, and is in its way.
    private func search(_ list: Int, _ entry: Entry, _ found: inout Int32) {
        var slot = list == entry.list ? entry.older : newest[list]
        while slot != Self.none {
            let other = entries[Int(slot)]
            if found != Self.none, other.number <= entries[Int(found)].number { return }
            if other.number < entry.number, other.isSerialising || entry.isSerialising,
                other.range.overlaps(entry.range)
            {
                found = slot
                return
            }
            slot = other.older
        }
    }

    /// Has `continuation` resume when `obstacle` has left.
    mutating func wait(for obstacle: Request, _ continuation: UnsafeContinuation<Void, Never>) {
        entries[Int(obstacle.slot)].sleepers.append(continuation)
    }

    mutating func leave(_ request: Request) {
        let slot = Int(request.slot)
        let entry = entries[slot]
        if entry.newer == Self.none {
            newest[entry.list] = entry.older
        } else {
            entries[Int(entry.newer)].older = entry.older
        }
        if entry.older != Self.none { entries[Int(entry.older)].newer = entry.newer }
        countsBySize[Self.sizeClass(of: entry.range)] -= 1
        if entry.isSerialising { serialisingCount -= 1 }
        free.append(request.slot)
        guard !entry.sleepers.isEmpty else { return }
        entries[slot].sleepers = []
        for sleeper in entry.sleepers { sleeper.resume() }
    }

    /// Which of ``zoneShifts`` goes for a request.
    private static func sizeClass(of range: ByteRange) -> Int {
        if range.count <= 1 << 16 { return 0 }
        if range.count <= 1 << 22 { return 1 }
        return range.count <= 1 << 28 ? 2 : 3
    }

    /// Zones beside each other are in different lists.
    private static func list(_ size: Int, zone: Int) -> Int {
        (zone &* 4 &+ size) & (listCount - 1)
    }
}
