#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

// The one place where `errno` values and error codes meet.

extension BlockError.Code {
    /// The `errno` value that stands for the code when no system call gave one.
    public var systemError: Int32 {
        switch self {
        case .invalidArgument, .wrongFormat, .protocolViolation: EINVAL
        case .notFound: ENOENT
        case .alreadyExists: EEXIST
        case .permissionDenied: EACCES
        case .readOnly: EPERM
        case .outOfRange: EINVAL
        case .noSpace: ENOSPC
        case .inputOutput, .corrupt: EIO
        case .unsupported: ENOTSUP
        case .busy: EBUSY
        case .timedOut: ETIMEDOUT
        case .disconnected: EPIPE
        case .exhausted: ENOMEM
        case .cancelled: ECANCELED
        }
    }

    /// The code for an `errno` value.
    public init(systemError: Int32) {
        switch systemError {
        case EINVAL, EDOM, ENAMETOOLONG, ELOOP, EISDIR, ENOTDIR: self = .invalidArgument
        case ENOENT, ENXIO, ENODEV: self = .notFound
        case EEXIST: self = .alreadyExists
        case EACCES, EPERM: self = .permissionDenied
        case EROFS: self = .readOnly
        case ENOSPC, EDQUOT, EFBIG: self = .noSpace
        case ENOTSUP, ENOSYS, ENOTTY: self = .unsupported
        case EBUSY, EAGAIN, EADDRINUSE, ETXTBSY: self = .busy
        case ETIMEDOUT: self = .timedOut
        case EPIPE, ECONNRESET, ECONNREFUSED, ENOTCONN, ECONNABORTED: self = .disconnected
        case ENOMEM, EMFILE, ENFILE, ENOBUFS: self = .exhausted
        case ECANCELED: self = .cancelled
        default: self = .inputOutput
        }
    }
}

extension BlockError {
    /// The error of a system call: `"<what>: <the system's words>"`.
    ///
    /// - Parameters:
    ///   - what: what was being done to what, as in `"cannot open '/x.img'"`.
    ///   - systemError: the `errno` value, positive.
    public static func system(
        _ what: String, _ systemError: Int32, remedy: String? = nil, node: String? = nil
    ) -> BlockError {
        BlockError(
            Code(systemError: systemError), "\(what): \(describe(systemError))", remedy: remedy,
            node: node, systemError: systemError)
    }

    /// The system's words for an `errno` value.
    public static func describe(_ systemError: Int32) -> String {
        withUnsafeTemporaryAllocation(of: CChar.self, capacity: 256) { buffer in
            guard let base = buffer.baseAddress else { return "error \(systemError)" }
            strerror_r(systemError, base, buffer.count)
            return String(cString: base)
        }
    }
}
