/// Lets one task of a thread at a time do something that suspends. Confined to that thread.
final class WalkLock: @unchecked Sendable {
    private var isHeld = false
    private var sleepers: [UnsafeContinuation<Void, Never>] = []

    func lock() async {
        while isHeld { await withUnsafeContinuation { sleepers.append($0) } }
        isHeld = true
    }

    func unlock() {
        isHeld = false
        if !sleepers.isEmpty { sleepers.removeFirst().resume() }
    }
}
