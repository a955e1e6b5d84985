/// The one error of the engine: a small stable code, what failed and where, why, and what to do.
///
/// `BlockError` is what every throwing function of the data path throws (`throws(BlockError)`), so no
/// request pays for an existential box. It is two words: the code, and a reference to the rest.
public struct BlockError: Error, Sendable {
    /// Stable: scripts and tests may rely on these, messages may improve.
    public enum Code: UInt8, Sendable, CaseIterable {
        /// An argument, option or request makes no sense, whatever the state.
        case invalidArgument
        /// A file, node, export, snapshot… of that name does not exist.
        case notFound
        /// The name is taken already.
        case alreadyExists
        /// The operating system, a lock or a permission of the graph refuses.
        case permissionDenied
        /// A write reached something read-only.
        case readOnly
        /// A request reaches past the end of the node.
        case outOfRange
        /// No space left on the storage below, or a size cap was reached.
        case noSpace
        /// The storage failed.
        case inputOutput
        /// The request, option or format feature is not supported.
        case unsupported
        /// The image violates its format.
        case corrupt
        /// The image is not of the format asked for.
        case wrongFormat
        /// In use; the message names the user.
        case busy
        /// A deadline passed.
        case timedOut
        /// The peer went away.
        case disconnected
        /// Memory, descriptors or a named limit are exhausted.
        case exhausted
        /// The operation was cancelled.
        case cancelled
        /// The peer violated the protocol.
        case protocolViolation
    }

    /// Everything but the code; shared, immutable.
    final class Details: Sendable {
        let message: String
        let remedy: String?
        let node: String?
        let systemError: Int32

        init(message: String, remedy: String?, node: String?, systemError: Int32) {
            self.message = message
            self.remedy = remedy
            self.node = node
            self.systemError = systemError
        }
    }

    public let code: Code
    private let details: Details

    /// - Parameters:
    ///   - message: what failed, on which file or object, and why; no full stop, no prefix.
    ///   - remedy: what the user can do about it.
    ///   - node: the name of the block node that failed.
    ///   - systemError: the `errno` value behind it; 0 takes the code's own (see ``systemError``).
    public init(
        _ code: Code, _ message: String, remedy: String? = nil, node: String? = nil,
        systemError: Int32 = 0
    ) {
        self.code = code
        details = Details(message: message, remedy: remedy, node: node, systemError: systemError)
    }

    /// What failed and why, without the node and the remedy.
    public var message: String { details.message }
    /// What the user can do about it.
    public var remedy: String? { details.remedy }
    /// The node that failed, where one is known.
    public var node: String? { details.node }

    /// The `errno` value that stands for this error on the wire (NBD) and in exit paths; never 0.
    public var systemError: Int32 {
        details.systemError != 0 ? details.systemError : code.systemError
    }

    /// The same error, said of `node`; an error that names its node already stays as it is.
    public func on(node: String) -> BlockError {
        if details.node != nil { return self }
        return BlockError(
            code, details.message, remedy: details.remedy, node: node,
            systemError: details.systemError)
    }

    /// The same error with what was being done put in front: `"context: message"`.
    public func doing(_ context: String) -> BlockError {
        BlockError(
            code, "\(context): \(details.message)", remedy: details.remedy, node: details.node,
            systemError: details.systemError)
    }
}

extension BlockError: CustomStringConvertible {
    public var description: String {
        var text = message
        if let node { text = "node '\(node)': \(text)" }
        if let remedy { text += "; \(remedy)" }
        return text
    }
}

extension BlockError: Equatable {
    /// Two errors are equal when code, node and message are.
    public static func == (left: BlockError, right: BlockError) -> Bool {
        left.code == right.code && left.message == right.message && left.node == right.node
    }
}
