import BlockCore
import QMP

/// The options that every node has, whatever its driver.
public struct NodeOptions: Sendable, Equatable {
    public enum ZeroDetection: String, Sendable, CaseIterable { case off, on, unmap }
    enum Discard: String, Sendable, CaseIterable { case ignore, off, unmap, on }

    public var isReadOnly = false
    /// Open read-only when writing is not allowed.
    public var autoReadOnly = false
    /// Pass discards on.
    public var discards = false
    /// Turn writes of zeroes into zeroing.
    public var zeroDetection = ZeroDetection.off
    /// Past the host's page cache (`cache.direct`).
    public var isDirect = false
    /// Do not flush to stable storage (`cache.no-flush`): fast, and lost with the power.
    public var ignoresFlush = false
    /// Let others write meanwhile (`force-share`); read-only nodes only.
    public var sharesAll = false
    /// Nothing that the image names is followed: no backing file, no data file.
    public var isUntrusted = false
    /// The image is opened to be checked or repaired, and for nothing else: its driver takes it
    /// whatever state it is in.
    public var isForCheck = false
    /// The image is opened for what it says of itself, and for nothing else: no guest data is read, and
    /// the file that holds it need not be there. Read-only nodes only.
    public var isForInformation = false

    /// The options' names.
    static let keys: Set<String> = [
        "read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache",
    ]

    public init() {}

    /// What a child gets where it does not say otherwise.
    func inherited(by roles: ChildRole) -> NodeOptions {
        var child = self
        child.zeroDetection = .off
        if roles.contains(.cow) {
            child.isReadOnly = true
            child.autoReadOnly = false
        }
        // Formats send flushes and respect the discard policy: below them both may be on.
        child.discards = true
        child.isForCheck = false
        child.isForInformation = false
        return child
    }

    /// Reads the generic options; `inherited` stands where they are silent.
    init(reading options: OptionReader, inheriting inherited: NodeOptions) throws(BlockError) {
        self = inherited
        if let value = try options.bool("read-only") { isReadOnly = value }
        if let value = try options.bool("auto-read-only") { autoReadOnly = value }
        if let value = try options.bool("force-share") { sharesAll = value }
        if let value = try options.bool("untrusted") { isUntrusted = value }
        if let value = try options.enumeration("discard", as: Discard.self) {
            discards = value == .unmap || value == .on
        }
        if let value = try options.enumeration("detect-zeroes", as: ZeroDetection.self) {
            zeroDetection = value
        }
        if let cache = try options.object("cache") {
            if let value = try cache.bool("direct") { isDirect = value }
            if let value = try cache.bool("no-flush") { ignoresFlush = value }
            try cache.finish()
        }
        if sharesAll, !isReadOnly {
            throw BlockError(
                .invalidArgument, "force-share=on needs read-only=on: two writers destroy an image")
        }
        if zeroDetection == .unmap, !discards {
            throw BlockError(.invalidArgument, "detect-zeroes=unmap needs discard=unmap")
        }
    }
}
