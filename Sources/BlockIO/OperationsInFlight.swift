/// Operations that are under way beside each other, for those that must know when the ones before have ended.
///
/// The system tells once of data that did not get to the storage, to whoever asks first: to one of two flushes, to a
/// durable write, or where pages that were written are dropped from the page cache. Of two that ask at the same time
/// the other one hears that all is well. So its answer counts only when the others that were under way
/// beside it have ended, and none of them was told.
///
/// Confined to the thread of those who begin and end them.
package final class OperationsInFlight {
    private var numbers: Set<Int> = []
    private var last = 0
    private let ends = WaitQueue()

    package init() {}

    package var count: Int { numbers.count }

    package func begin() -> Int {
        last += 1
        numbers.insert(last)
        return last
    }

    /// What the operation was told is known to whoever it matters to.
    package func end(_ number: Int) {
        numbers.remove(number)
        ends.wakeAll()
    }

    /// Returns when all those that have begun by now have ended.
    package func untilBegunEnd() async {
        let last = last
        while numbers.contains(where: { $0 <= last }) { await ends.wait() }
    }

    /// Returns when no more than so many are under way.
    package func until(atMost limit: Int) async {
        while numbers.count > limit { await ends.wait() }
    }
}
