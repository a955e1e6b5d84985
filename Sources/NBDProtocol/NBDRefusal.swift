import BlockCore

/// Why a request is not executed.
public struct NBDRefusal: Hashable, Sendable {
    public enum Reason: Hashable, Sendable {
        case unknownCommand(UInt16)
        /// The client was not told of the command.
        case notOffered
        /// Flags that the command does not have, or that were not offered.
        case flags
        case readOnly
        case pastEnd(exportSize: Int)
        /// A read or write of more than ``NBDLimits/payloadBytesMax``.
        case tooLong
        /// It breaks the client's promise.
        case unaligned(blockSize: Int)
        /// A block status without a metadata context.
        case noContext
        /// A block status about nothing.
        case empty
        /// A block status with a payload that makes no sense.
        case payload
    }

    public let error: NBDErrorCode
    public let reason: Reason
    /// As the request's header has it.
    public let length: UInt64

    init(_ error: NBDErrorCode, _ reason: Reason, length: UInt64) {
        self.error = error
        self.reason = reason
        self.length = length
    }

    /// What is wrong, for people: replies carry it in the structured and extended modes.
    ///
    /// - Parameter request: the one that is refused.
    public func message(for request: NBDRequest) -> String {
        let name = request.command.name
        switch reason {
        case .unknownCommand(let type): return "there is no command \(type)"
        case .notOffered: return "\(name) is not offered by this export"
        case .flags:
            return "\(name) with the flags 0x\(String(request.flags.rawValue, radix: 16)) is not "
                + "offered by this export"
        case .readOnly: return "the export is read-only"
        case .pastEnd(let size):
            return "\(name) of \(length) bytes at \(request.headerOffset) reaches past the end of "
                + "the export at \(size)"
        case .tooLong:
            return "\(name) of \(length) bytes is longer than \(NBDLimits.payloadBytesMax)"
        case .unaligned(let blockSize):
            return "\(name) of \(length) bytes at \(request.headerOffset) does not keep to blocks "
                + "of \(blockSize)"
        case .noContext: return "no metadata context was agreed on"
        case .empty: return "\(name) of no bytes has no answer"
        case .payload:
            return "\(name) has a payload of \(length) bytes that is not one of its own"
        }
    }
}

extension NBDCommand {
    /// As the protocol calls it.
    var name: String {
        switch self {
        case .read: "READ"
        case .write: "WRITE"
        case .disconnect: "DISC"
        case .flush: "FLUSH"
        case .trim: "TRIM"
        case .cache: "CACHE"
        case .writeZeroes: "WRITE_ZEROES"
        case .blockStatus: "BLOCK_STATUS"
        }
    }
}
