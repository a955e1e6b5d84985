import BlockCore
import BlockIO

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The open file that a monitor's commands come from. Confined to the daemon's thread.
final class DescriptorInput: @unchecked Sendable {
    /// `nil`: no command ever comes.
    let descriptor: Int32?
    private let name: String
    private let thread: IOThread
    private(set) var isShutDown = false
    private let ending = WakeUp()

    /// - Parameter name: what messages call it.
    init(_ descriptor: Int32?, _ name: String, on thread: IOThread) {
        self.descriptor = descriptor
        self.name = name
        self.thread = thread
    }

    /// Receives at least one byte; 0 is the end.
    func receive(_ vector: IOVector) async throws(BlockError) -> Int {
        guard let descriptor else {
            while !isShutDown { await ending.wait() }
            return 0
        }
        var bytes = [UInt8](repeating: 0, count: vector.count)
        while !isShutDown {
            let ready = await thread.perform(.awaitReadable(IOHandle(descriptor)))
            if isShutDown || ready == -Int(ECANCELED) { return 0 }
            // It does not wait: there is something to read, or the end.
            let count = read(descriptor, &bytes, bytes.count)
            // A refusal is of datagrams: what was sent before found nobody.
            if count < 0, [EINTR, EAGAIN, ECONNREFUSED].contains(errno) { continue }
            guard count >= 0 else { throw .system("cannot read \(name)", errno) }
            bytes.withUnsafeBytes {
                vector.slice(0, count).copy(from: UnsafeRawBufferPointer(rebasing: $0[..<count]))
            }
            return count
        }
        return 0
    }

    /// Who waits for a byte finds the end.
    func shutdown() {
        guard !isShutDown else { return }
        isShutDown = true
        if let descriptor { thread.engine.cancelAll(on: IOHandle(descriptor)) }
        ending.wake()
    }
}
