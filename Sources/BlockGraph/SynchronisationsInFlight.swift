import BlockIO

/// Requests in flight on a node of storage that make something durable: flushes and durable writes.
///
/// The system tells once of data that did not get to the storage, to whoever asks first. Of two that ask at the
/// same time the other one hears that all is well. So a flush counts only when the others that were under
/// way beside it have ended, and none of them was told.
///
/// Confined to the node's thread.
final class SynchronisationsInFlight {
    private var numbers: Set<Int> = []
    private var last = 0
    private let ends = WaitQueue()

    func begin() -> Int {
        last += 1
        numbers.insert(last)
        return last
    }

    /// What it was told is known to the node.
    func end(_ number: Int) {
        numbers.remove(number)
        ends.wakeAll()
    }

    /// Returns when all those that have begun by now have ended.
    func untilOthersEnd() async {
        let last = last
        while numbers.contains(where: { $0 <= last }) { await ends.wait() }
    }
}
