#if os(Linux)
import BlockCore
import Glibc

/// Looks through `/proc` for who has a file open: for errors that name the holder of a lock.
enum ProcessFiles {
    /// `"name (pid 123)"` of every other process that has the file open and may be looked at.
    static func holders(of identity: FileIdentity) -> [String] {
        var result: [String] = []
        let own = getpid()
        for entry in entries(of: "/proc") {
            guard let process = Int32(entry), process != own,
                hasOpen(process, identity)
            else { continue }
            result.append("\(name(of: process)) (pid \(process))")
            if result.count == 8 { break }
        }
        return result
    }

    private static func hasOpen(_ process: Int32, _ identity: FileIdentity) -> Bool {
        let folder = "/proc/\(process)/fd"
        for entry in entries(of: folder) {
            var info = stat()
            if stat("\(folder)/\(entry)", &info) == 0, UInt64(info.st_ino) == identity.inode,
                UInt64(info.st_dev) == identity.device
            {
                return true
            }
        }
        return false
    }

    private static func name(of process: Int32) -> String {
        let descriptor = hostOpen("/proc/\(process)/comm", O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return "process" }
        defer { _ = hostClose(descriptor) }
        let text = withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 64) { buffer in
            let count = read(descriptor, buffer.baseAddress, buffer.count)
            return String(decoding: buffer.prefix(max(0, count)), as: UTF8.self)
        }
        return text.last == "\n" ? String(text.dropLast()) : text
    }

    private static func entries(of path: String) -> [String] {
        guard let directory = opendir(path) else { return [] }
        defer { closedir(directory) }
        var result: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != ".", name != ".." { result.append(name) }
        }
        return result
    }
}
#endif
