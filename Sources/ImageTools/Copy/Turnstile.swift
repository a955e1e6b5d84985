/// Lets workers through one by one, in the order of their items. Confined to one thread.
final class Turnstile: @unchecked Sendable {
    private var next = 0
    private var waiting: [Int: UnsafeContinuation<Void, Never>] = [:]
    private var passed: Set<Int> = []

    /// Waits until all items before `index` have passed.
    func wait(for index: Int) async {
        if index == next { return }
        await withUnsafeContinuation { waiting[index] = $0 }
    }

    /// The item has passed; once for each.
    func pass(_ index: Int) {
        passed.insert(index)
        while passed.remove(next) != nil { next += 1 }
        waiting.removeValue(forKey: next)?.resume()
    }
}
