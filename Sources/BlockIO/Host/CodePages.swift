#if os(Linux)
import CLinux
#endif

/// The program's own code and constants in memory.
///
/// Starting runs far more code than serving does (option parsing, the runtime's tables), and the kernel
/// maps sixteen pages around each one that is touched. A daemon that has become idle gives them back
/// once, and from then on holds what it uses. The pages stay in the page cache: nothing is read again.
public enum CodePages {
    /// Drops them from this process `seconds` from now. On the thread only.
    ///
    /// Who is busy by then takes back what it uses, some dozen page faults.
    public static func release(after seconds: Int, on thread: IOThread) {
        thread.preconditionOnThread()
        #if os(Linux)
        thread.spawn {
            await thread.sleep(nanoseconds: UInt64(seconds) * 1_000_000_000)
            linux_release_code_pages()
        }
        #endif
    }
}
