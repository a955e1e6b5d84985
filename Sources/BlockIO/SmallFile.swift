import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Files that are read whole: secrets.
public enum SmallFile {
    /// All of a file or pipe, up to its end. Blocks: for worker threads.
    public static func read(_ path: String, bytesMax: Int) throws(BlockError) -> [UInt8] {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { throw .system("cannot open '\(path)'", errno) }
        defer { close(descriptor) }
        var result: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = chunk.withUnsafeMutableBytes {
                #if canImport(Glibc)
                Glibc.read(descriptor, $0.baseAddress, $0.count)
                #elseif canImport(Musl)
                Musl.read(descriptor, $0.baseAddress, $0.count)
                #else
                Darwin.read(descriptor, $0.baseAddress, $0.count)
                #endif
            }
            if count == 0 { return result }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw .system("cannot read '\(path)'", errno) }
            result += chunk[..<count]
            guard result.count <= bytesMax else {
                throw BlockError(.exhausted, "'\(path)' is larger than \(bytesMax) bytes")
            }
        }
    }
}
