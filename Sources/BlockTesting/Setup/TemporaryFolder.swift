import BlockCore
import BlockIO
import CBlockTesting

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A private folder for the files of a test, who removes it at the end.
public struct TemporaryFolder: Sendable {
    public let path: String

    public init() throws(BlockError) {
        var name = Array("/tmp/merino-test-XXXXXX".utf8CString)
        guard let made = mkdtemp(&name) else {
            throw .system("cannot make a temporary folder", errno)
        }
        path = String(cString: made)
    }

    /// The path of a file in it.
    public subscript(name: String) -> String { "\(path)/\(name)" }

    /// Makes a file: a hole, or full of one byte.
    public func makeFile(
        _ name: String, size: Int, of byte: UInt8? = nil, on thread: IOThread
    ) async throws(BlockError) {
        let file = try await File.open(
            self[name], FileOptions(writable: true, create: true), on: thread)
        try await file.setSize(size)
        if let byte {
            let data = try IOVector(allocating: size)
            data.fill(byte)
            try await file.write(data, at: 0)
        }
        await file.close()
    }

    /// Removes it with all that is in it.
    public func remove() {
        testing_remove_folder(path)
    }
}
