import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Page-aligned memory by powers of two, kept for reuse.
///
/// The pool is shared by all threads: a buffer is often filled on one and dropped on another. What it
/// keeps is bounded, by ``Limits/bufferPoolBytesMax`` at first; the rest goes back to the system.
final class BufferPool: Sendable {
    static let shared = BufferPool()

    /// Pooled classes: 4 KiB (`1 << 12`) to 2 MiB (`1 << 21`). Larger buffers are not kept.
    static let smallestShift = 12
    static let largestShift = 21
    static let alignment = 4096

    // Memory that nobody uses may move between threads.
    private struct Shelf: @unchecked Sendable {
        var free = [[UnsafeMutableRawPointer]](
            repeating: [], count: BufferPool.largestShift - BufferPool.smallestShift + 1)
        var bytes = 0
        var bytesMax = Limits.bufferPoolBytesMax
    }

    private let shelf = Mutex(Shelf())

    /// The size that serves a request of `count` bytes.
    static func capacity(for count: Int) -> Int {
        let least = max(count, 1 << smallestShift)
        if least > 1 << largestShift {
            return (least + alignment - 1) & ~(alignment - 1)
        }
        return 1 << (Int.bitWidth - (least - 1).leadingZeroBitCount)
    }

    /// Memory of ``capacity(for:)`` bytes, its content undefined; `nil` when there is none.
    func allocate(capacity: Int) -> UnsafeMutableRawPointer? {
        if let index = Self.index(of: capacity) {
            let kept: UnsafeMutableRawPointer? = shelf.withLock { shelf in
                guard let memory = shelf.free[index].popLast() else { return nil }
                shelf.bytes -= capacity
                return memory
            }
            if let kept { return kept }
        }
        var memory: UnsafeMutableRawPointer?
        guard posix_memalign(&memory, Self.alignment, capacity) == 0 else { return nil }
        return memory
    }

    func release(_ memory: UnsafeMutableRawPointer, capacity: Int) {
        if let index = Self.index(of: capacity) {
            let kept = shelf.withLock { shelf in
                guard shelf.bytes + capacity <= shelf.bytesMax else { return false }
                shelf.free[index].append(memory)
                shelf.bytes += capacity
                return true
            }
            if kept { return }
        }
        free(memory)
    }

    func keep(atMost bytes: Int) {
        shelf.withLock { $0.bytesMax = bytes }
    }

    private static func index(of capacity: Int) -> Int? {
        guard capacity <= 1 << largestShift else { return nil }
        return capacity.trailingZeroBitCount - smallestShift
    }
}
