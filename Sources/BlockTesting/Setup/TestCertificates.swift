#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Certificates and keys in a private directory, made once in the process and removed at its end.
///
/// What is in it, `Tests/Support/make-certificates` says: `x509`, `psk`, `stranger` and others.
public enum TestCertificates {
    /// Empty when they could not be made: nothing is found there then.
    public static let directory: String = {
        let path = "/tmp/merino-certificates-\(getpid())-\(UInt32.random(in: 0 ... .max))"
        guard run(["/bin/sh", script, path]) else { return "" }
        atexit { _ = TestCertificates.run(["/bin/rm", "-rf", TestCertificates.directory]) }
        return path
    }()

    public static func path(_ name: String) -> String { "\(directory)/\(name)" }

    /// Beside the tests, four folders up from here.
    private static let script: String = {
        var parts = #filePath.split(separator: "/", omittingEmptySubsequences: false)
        parts.removeLast(4)
        return parts.joined(separator: "/") + "/Tests/Support/make-certificates"
    }()

    private static func run(_ arguments: [String]) -> Bool {
        var process = pid_t()
        let words = arguments.map { strdup($0) }
        defer { for word in words { free(word) } }
        var pointers = words + [nil]
        guard posix_spawn(&process, arguments[0], nil, nil, &pointers, environ) == 0 else {
            return false
        }
        var status: Int32 = 0
        while waitpid(process, &status, 0) < 0 {
            if errno != EINTR { return false }
        }
        return status == 0
    }
}
