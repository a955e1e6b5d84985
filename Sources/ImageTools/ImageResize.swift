import BlockCore
import BlockGraph

/// `resize`: gives an image another size.
public struct ImageResize: Sendable {
    public enum Change: Sendable, Equatable {
        case to(Int)
        case by(Int)
    }

    public var source: ImageSource
    public var change: Change
    public var preallocation = Preallocation.off
    /// The user knows that shrinking throws data away.
    public var mayShrink = false

    public init(_ source: ImageSource, _ change: Change) {
        self.source = source
        self.change = change
    }

    /// Reads a size as users write it: `10G`, or a change of it: `+1G`, `-512M`.
    public static func change(_ text: String) throws(BlockError) -> Change {
        let sign = text.first
        let digits = sign == "+" || sign == "-" ? text.dropFirst() : text[...]
        guard let size = SizeText.parse(digits) else {
            throw BlockError(
                .invalidArgument, "the size cannot be '\(text)'",
                remedy: "give bytes, or a number with k, M, G, T, P or E; with + or - in front to "
                    + "change the size by that")
        }
        switch sign {
        case "+": return .by(size)
        case "-": return .by(-size)
        default: return .to(size)
        }
    }

    public func run(in session: ToolSession) async throws(BlockError) {
        let user = try await session.use(
            source, as: "resize",
            Access(uses: [.consistentRead, .resize], shares: .consistentRead))
        let size = try newSize(user.size, of: user.node.description.name)
        if size < user.size {
            guard preallocation == .off else {
                throw BlockError(
                    .invalidArgument, "space can be reserved only where an image grows")
            }
            guard mayShrink else {
                throw BlockError(
                    .invalidArgument,
                    "making the image smaller throws away what lies past the new end, at \(size)",
                    remedy: "make sure that nothing is there, then say --shrink")
            }
        }
        guard size != user.size || preallocation == .off else {
            throw BlockError(.invalidArgument, "space can be reserved only where an image grows")
        }
        if size != user.size { try await user.resize(to: size, preallocation) }
        try await user.flush()
        try await session.graph.detach(user)
    }

    private func newSize(_ current: Int, of format: String) throws(BlockError) -> Int {
        let wanted: Int?
        switch change {
        case .to(let size): wanted = size
        case .by(let difference): wanted = current.adding(difference)
        }
        // Sectors are what every reader of an image can count on; a raw file may end within one, and
        // qcow2 says itself what it takes.
        let isExact = format == "raw" || format == "qcow2"
        guard let wanted, wanted > 0, let size = isExact ? wanted : wanted.roundedUp(to: 512),
            size <= Limits.nodeSizeMax
        else {
            throw BlockError(
                .invalidArgument, "the new size is not between 1 and \(Limits.nodeSizeMax) bytes")
        }
        return size
    }
}
