#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Bytes that are secret: overwritten when the last reference goes.
public final class SecretBytes: Sendable {
    /// Bytes.
    public let count: Int
    // Written before the initialiser returns and in `deinit` only.
    private nonisolated(unsafe) let memory: UnsafeMutableRawBufferPointer

    /// Memory of `count` bytes that `fill` fills in.
    public init(count: Int, _ fill: (UnsafeMutableRawBufferPointer) -> Void) {
        self.count = count
        memory = .allocate(byteCount: max(count, 1), alignment: 16)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
        fill(UnsafeMutableRawBufferPointer(rebasing: memory[0..<count]))
    }

    public convenience init(_ bytes: [UInt8]) {
        self.init(count: bytes.count) { $0.copyBytes(from: bytes) }
    }

    /// Takes the bytes over: the array is overwritten, unless somebody else shares its memory.
    public convenience init(taking bytes: inout [UInt8]) {
        self.init(bytes)
        bytes.withUnsafeMutableBytes { Self.wipe($0) }
        bytes = []
    }

    deinit {
        Self.wipe(memory)
        memory.deallocate()
    }

    /// Overwrites memory in a way that no compiler takes for useless.
    private static func wipe(_ memory: UnsafeMutableRawBufferPointer) {
        guard let start = memory.baseAddress else { return }
        #if canImport(Darwin)
        memset_s(start, memory.count, 0, memory.count)
        #else
        explicit_bzero(start, memory.count)
        #endif
    }

    /// Valid during the call.
    public func withBytes<T>(_ body: (UnsafeRawBufferPointer) -> T) -> T {
        body(UnsafeRawBufferPointer(rebasing: memory[0..<count]))
    }

    /// Takes as long whether the bytes are equal or not.
    public func isEqual(to other: SecretBytes) -> Bool {
        guard count == other.count else { return false }
        return withBytes { mine in
            other.withBytes { theirs in
                var difference: UInt8 = 0
                for index in 0..<mine.count { difference |= mine[index] ^ theirs[index] }
                return difference == 0
            }
        }
    }
}

extension SecretBytes {
    /// The bytes as an array, which nobody overwrites: for a moment, and what takes nothing else.
    public var array: [UInt8] { withBytes { Array($0) } }
}
