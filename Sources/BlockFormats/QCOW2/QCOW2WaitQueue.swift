/// Tasks of one thread that wait until something is done.
final class QCOW2WaitQueue {
    private var sleepers: [UnsafeContinuation<Void, Never>] = []

    func wait() async {
        await withUnsafeContinuation { sleepers.append($0) }
    }

    func wakeAll() {
        let woken = sleepers
        sleepers = []
        for sleeper in woken { sleeper.resume() }
    }
}
