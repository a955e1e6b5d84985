import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The two streams of ciphertext of a session: what GnuTLS pulls and what it pushes.
final class TLSQueues {
    /// Bytes of the memory that pushed ciphertext is gathered in.
    private static let chunkBytes = 64 << 10

    private var input: [IOSlice] = []
    private var inputIndex = 0
    private(set) var inputCount = 0
    var isEnded = false

    private var output = IOVector()
    private var chunk: IOBuffer?
    /// Bytes of the chunk that are in use; never written again, for a send may be reading them.
    private var chunkEnd = 0
    /// What went wrong in here, where GnuTLS can only say that something did.
    private(set) var failure: BlockError?

    var canPull: Bool { inputCount > 0 || isEnded }

    func append(_ slice: IOSlice) {
        guard slice.count > 0 else { return }
        if inputIndex == input.count {
            input.removeAll(keepingCapacity: true)
            inputIndex = 0
        }
        input.append(slice)
        inputCount += slice.count
    }

    /// Fills `target` as far as input goes: bytes, 0 at the end, -1 with `EAGAIN` when there is none.
    func pull(_ target: UnsafeMutableRawBufferPointer) -> Int {
        guard inputCount > 0 else {
            if isEnded { return 0 }
            errno = EAGAIN
            return -1
        }
        var done = 0
        while done < target.count, inputIndex < input.count {
            let slice = input[inputIndex]
            let count = min(slice.count, target.count - done)
            UnsafeMutableRawBufferPointer(rebasing: target[done..<(done + count)])
                .copyMemory(from: UnsafeRawBufferPointer(rebasing: slice.bytes[..<count]))
            done += count
            if count == slice.count {
                inputIndex += 1
            } else {
                input[inputIndex] = slice.slice(count, slice.count - count)
            }
        }
        inputCount -= done
        return done
    }

    /// Takes ciphertext from GnuTLS: all of it, or -1 when there is no memory.
    func push(_ source: UnsafeRawBufferPointer) -> Int {
        var done = 0
        while done < source.count {
            do throws(BlockError) {
                let buffer = try currentChunk()
                let count = min(TLSQueues.chunkBytes - chunkEnd, source.count - done)
                let slice = IOSlice(buffer, chunkEnd, count)
                slice.bytes.copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: source[done..<(done + count)]))
                output.append(slice)
                chunkEnd += count
                done += count
            } catch {
                failure = error
                errno = ENOMEM
                return -1
            }
        }
        return done
    }

    private func currentChunk() throws(BlockError) -> IOBuffer {
        if let chunk, chunkEnd < TLSQueues.chunkBytes { return chunk }
        let fresh = try IOBuffer(count: TLSQueues.chunkBytes)
        chunk = fresh
        chunkEnd = 0
        return fresh
    }

    func takeOutput() -> IOVector {
        defer { output = IOVector() }
        return output
    }
}
