#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The folder that relative paths are looked up from.
public enum WorkingFolder {
    /// The path from the root of the tree, which means the same when the folder changes. Links in it stay;
    /// as it is where the folder cannot be found.
    public static func absolute(_ path: String) -> String {
        guard !path.hasPrefix("/"), let folder = getcwd(nil, 0) else { return path }
        defer { free(folder) }
        let start = String(cString: folder)
        return (start == "/" ? "" : start) + "/" + path
    }
}
