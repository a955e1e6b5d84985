import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The error values that may stand on the wire, whatever `errno` is on this system
/// (proto.md, "Error values").
public enum NBDErrorCode: UInt32, Sendable, CaseIterable {
    case none = 0
    case notPermitted = 1
    case inputOutput = 5
    case noMemory = 12
    case invalid = 22
    case noSpace = 28
    case overflow = 75
    case notSupported = 95
    case shutdown = 108

    /// The wire's value for an `errno` of this system, positive; 0 is ``none``.
    public init(systemError: Int32) {
        switch systemError {
        case 0: self = .none
        case EPERM, EACCES, EROFS: self = .notPermitted
        case ENOMEM, ENOBUFS: self = .noMemory
        case EINVAL, EDOM: self = .invalid
        case ENOSPC, EDQUOT, EFBIG: self = .noSpace
        case EOVERFLOW: self = .overflow
        case ENOTSUP, EOPNOTSUPP, ENOSYS, ENOTTY: self = .notSupported
        case ESHUTDOWN, ECANCELED: self = .shutdown
        default: self = .inputOutput
        }
    }

    /// The wire's value for an error of the engine, in reply to `request`.
    ///
    /// `NBD_ENOTSUP` is only meant for fast zeroing and `NBD_EOVERFLOW` only for a read that may not
    /// be fragmented; elsewhere both become `NBD_EINVAL`.
    public init(_ error: BlockError, replyingTo request: NBDRequest) {
        let code = NBDErrorCode(systemError: error.systemError)
        switch code {
        case .notSupported where !request.flags.contains(.fastZero),
            .overflow where !request.flags.contains(.dontFragment):
            self = .invalid
        default:
            self = code
        }
    }
}
