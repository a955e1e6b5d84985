import BlockIO

// Two ways of waiting for others on the same thread.

/// One waiter that others wake; a wake that comes first is not lost. Confined to its thread.
final class WakeUp {
    private var isSet = false
    private var waiter: UnsafeContinuation<Void, Never>?

    func wait() async {
        if isSet {
            isSet = false
            return
        }
        await withUnsafeContinuation { waiter = $0 }
    }

    func wake() {
        guard let waiting = waiter else {
            isSet = true
            return
        }
        waiter = nil
        waiting.resume()
    }
}

/// Lets one in at a time, in the order in which they came. Confined to its thread.
final class Turns {
    private var isTaken = false
    private var waiting: [UnsafeContinuation<Void, Never>] = []

    func take() async {
        if !isTaken {
            isTaken = true
            return
        }
        await withUnsafeContinuation { waiting.append($0) }
    }

    func pass() {
        if waiting.isEmpty {
            isTaken = false
        } else {
            waiting.removeFirst().resume()
        }
    }
}
