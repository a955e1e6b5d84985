import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The host's cache of file data.
public enum PageCache {
    /// What one copy may fill of it before it should stop keeping what it has done with: an eighth of the
    /// memory, in bytes.
    public static let fairShareBytes: Int = {
        let pages = Int(sysconf(Int32(_SC_PHYS_PAGES)))
        let pageBytes = Int(sysconf(Int32(_SC_PAGESIZE)))
        guard pages > 0, pageBytes > 0, let bytes = pages.multiplied(by: pageBytes) else {
            return 1 << 30
        }
        return bytes / 8
    }()
}
