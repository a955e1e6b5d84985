import BlockCore
import QMP

/// Memory that keeps what was written last: what does not fit pushes the oldest bytes out.
final class RingBuffer: CharacterDevice, @unchecked Sendable {
    static let sizeStandard = 64 << 10
    static let sizeMax = 16 << 20

    let typeName: String
    let filename = "ringbuf"
    let isUsed = false
    private var memory: [UInt8]
    /// Of all that was ever written: the place of the next byte to be written, and to be read.
    /// Invariant: `written - read` is at most the size, a power of two.
    private var written = 0
    private var read = 0

    init(_ options: OptionReader, typeName: String) throws(BlockError) {
        let size = try options.size("size") ?? Self.sizeStandard
        try options.finish()
        guard size.isPowerOfTwo, size <= Self.sizeMax else {
            throw BlockError(
                .invalidArgument,
                "the size of a ring buffer must be a power of two up to \(Self.sizeMax), not \(size)"
            )
        }
        memory = [UInt8](repeating: 0, count: size)
        self.typeName = typeName
    }

    func write(_ bytes: [UInt8]) {
        for byte in bytes {
            memory[written & (memory.count - 1)] = byte
            written += 1
        }
        read = max(read, written - memory.count)
    }

    /// Takes the oldest bytes out, `count` at most.
    func take(_ count: Int) -> [UInt8] {
        let end = min(written, read + min(count, memory.count))
        defer { read = end }
        return (read..<end).map { memory[$0 & (memory.count - 1)] }
    }

    func attach(to monitors: MonitorServer, isPretty: Bool) throws(BlockError) {
        throw BlockError(
            .unsupported, "nobody could ask a monitor anything on a ring buffer",
            remedy: "use socket or stdio")
    }

    func close() {}
}
