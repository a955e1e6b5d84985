#if os(Linux)
import BlockCore
import Glibc

/// Looks through `/proc` for who has a lock on a file: for errors that name its holder.
enum ProcessFiles {
    private static let holderCountMax = 8
    /// One opening of a file has some 50 bytes of text for each of its locks.
    private static let textBytesMax = 1 << 20

    /// Those that may be looked at, this process first.
    static func holders(ofLock byte: Int, besides handle: IOHandle) -> [LockHolder] {
        var file = stat()
        guard fstat(handle.rawValue, &file) == 0 else { return [] }
        var result: [LockHolder] = []
        if hasLock("/proc/self", file, byte, besides: handle.rawValue) {
            result.append(.thisProcess)
        }
        let own = getpid()
        for entry in entries(of: "/proc") {
            guard let process = Int32(entry), process != own,
                hasLock("/proc/\(process)", file, byte)
            else { continue }
            result.append(.process("\(name(of: process)) (pid \(process))"))
            if result.count == holderCountMax { break }
        }
        return result
    }

    private static func hasLock(
        _ process: String, _ file: stat, _ byte: Int, besides own: Int32? = nil
    ) -> Bool {
        for entry in entries(of: "\(process)/fd") where Int32(entry) != own {
            var info = stat()
            guard stat("\(process)/fd/\(entry)", &info) == 0, info.st_ino == file.st_ino,
                info.st_dev == file.st_dev
            else { continue }
            let path = "\(process)/fdinfo/\(entry)"
            guard let text = try? SmallFile.read(path, bytesMax: textBytesMax) else { continue }
            if lists(String(decoding: text, as: UTF8.self), lockOn: byte) { return true }
        }
        return false
    }

    /// Whether a file of `/proc/PID/fdinfo` lists a lock on `byte`: lines that begin with `lock:` and end
    /// with the first and the last byte of one, or `EOF`.
    static func lists(_ text: String, lockOn byte: Int) -> Bool {
        for line in text.split(separator: "\n") where line.hasPrefix("lock:") {
            let words = line.split(separator: " ").suffix(2)
            guard words.count == 2, let first = words.first.flatMap({ Int($0) }),
                let last = words.last
            else { continue }
            if first <= byte, last == "EOF" || Int(last).map({ byte <= $0 }) == true {
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
