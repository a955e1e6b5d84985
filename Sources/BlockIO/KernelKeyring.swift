import BlockCore

#if os(Linux)
import CLinux
import Glibc
#endif

/// Keys that the kernel keeps for processes (Linux, keyrings(7)).
public enum KernelKeyring {
    /// The text of the key with a serial number. Blocks.
    ///
    /// - Parameter bytesMax: the longest that is read.
    public static func read(_ serial: Int, bytesMax: Int) throws(BlockError) -> [UInt8] {
        #if os(Linux)
        guard let number = Int32(exactly: serial) else {
            throw BlockError(.invalidArgument, "no key has the serial number \(serial)")
        }
        // A key may be replaced by a longer one between the two calls.
        var bytes: [UInt8] = []
        while true {
            let count = linux_read_key(number, &bytes, bytes.count)
            guard count >= 0 else {
                throw .system("cannot read the key \(serial) of the kernel's keyring", errno)
            }
            guard count <= bytesMax else {
                throw BlockError(.exhausted, "the key \(serial) is too long")
            }
            if count <= bytes.count { return Array(bytes.prefix(count)) }
            bytes = [UInt8](repeating: 0, count: count)
        }
        #else
        throw BlockError(.unsupported, "the kernel's keyring is Linux's")
        #endif
    }
}
