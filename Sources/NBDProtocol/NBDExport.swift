import BlockCore

/// A metadata context that an export offers for block status.
public enum NBDContext: Hashable, Sendable {
    /// `base:allocation` (proto.md, "base:allocation metadata context").
    case baseAllocation
    /// `qemu:allocation-depth`: 0 where nothing is allocated, 1 in the top layer, 2 and up below.
    case allocationDepth
    /// `qemu:dirty-bitmap:NAME`: 1 where the bitmap is dirty.
    case dirtyBitmap(String)

    /// What begins the name of every dirty bitmap's context.
    public static let dirtyBitmapPrefix = "qemu:dirty-bitmap:"

    /// The name on the wire.
    public var name: String {
        switch self {
        case .baseAllocation: "base:allocation"
        case .allocationDepth: "qemu:allocation-depth"
        case .dirtyBitmap(let bitmap): NBDContext.dirtyBitmapPrefix + bitmap
        }
    }

    /// The queries of `NBD_OPT_LIST_META_CONTEXT` that name this context: its own name, its namespace
    /// (`base:`, `qemu:`) and `qemu:dirty-bitmap:`.
    var listQueries: [String] {
        switch self {
        case .baseAllocation: [name, "base:"]
        case .allocationDepth: [name, "qemu:"]
        case .dirtyBitmap: [name, "qemu:", NBDContext.dirtyBitmapPrefix]
        }
    }
}

/// The block sizes that an export announces, in bytes (proto.md, "Block size constraints").
public struct NBDBlockSizes: Hashable, Sendable {
    /// What requests should be aligned to: a power of two from 1 to 64 KiB.
    public let minimum: UInt32
    /// What requests perform well at: a power of two, at least ``minimum`` and 512.
    public let preferred: UInt32
    /// The largest read or write.
    public let maximum: UInt32

    /// Takes the nearest sizes that the protocol allows: powers of two within their bounds.
    public init(
        minimum: Int = 1, preferred: Int = 4_096, maximum: Int = NBDLimits.payloadBytesMax
    ) {
        let least = NBDBlockSizes.powerOfTwo(below: min(max(minimum, 1), 64 << 10))
        let best = NBDBlockSizes.powerOfTwo(below: min(max(preferred, 512, least), 32 << 20))
        let most = min(max(maximum, best), NBDLimits.payloadBytesMax)
        self.minimum = UInt32(least)
        self.preferred = UInt32(best)
        self.maximum = UInt32(most.roundedDown(to: least))
    }

    private static func powerOfTwo(below size: Int) -> Int {
        var result = 1
        while result <= size / 2 { result *= 2 }
        return result
    }
}

/// What a handshake tells of an export, and what its requests are checked against. A plain value:
/// making one opens nothing.
public struct NBDExportInfo: Hashable, Sendable {
    /// The name that the client should use for it; at most ``NBDLimits/stringBytesMax`` bytes.
    public var name: String
    /// For people; empty means none.
    public var description: String
    /// In bytes.
    public var size: Int
    /// What the export can do. `hasFlags` is added, and `sendDF` and `blockStatusPayload` come from
    /// what the client negotiates.
    public var flags: NBDTransmissionFlags
    public var blockSizes: NBDBlockSizes
    /// In the order of their ids: the id of a context is its index.
    public var contexts: [NBDContext]

    public init(
        name: String, description: String = "", size: Int, flags: NBDTransmissionFlags,
        blockSizes: NBDBlockSizes = NBDBlockSizes(), contexts: [NBDContext] = [.baseAllocation]
    ) {
        precondition(size >= 0 && contexts.count <= NBDLimits.contextCountMax)
        self.name = name
        self.description = description
        self.size = size
        self.flags = flags
        self.blockSizes = blockSizes
        self.contexts = contexts
    }

    /// The transmission flags that a client of `mode` is told.
    func transmissionFlags(for mode: NBDReplyMode) -> NBDTransmissionFlags {
        var result = flags.union(.hasFlags).subtracting([.sendDF, .blockStatusPayload])
        if mode >= .structured { result.insert(.sendDF) }
        if mode == .extended { result.insert(.blockStatusPayload) }
        return result
    }
}

/// The exports of a server at this moment. Asked anew for every option: exports may come and go, and
/// asking must open nothing, for anyone may knock.
public protocol NBDExportCatalogue {
    /// What `NBD_OPT_LIST` tells: every export that a stranger may know of.
    var exports: [NBDExportInfo] { get }

    /// The export of that name; the empty name asks for the default export. Compare names by their
    /// UTF-8 bytes: `String`'s `==` takes different spellings of an accent as equal.
    func export(named name: String) -> NBDExportInfo?
}

/// A catalogue that does not change.
public struct NBDFixedCatalogue: NBDExportCatalogue, Sendable {
    public var exports: [NBDExportInfo]
    /// The name that the empty name stands for, where it is not an export's own name.
    public var defaultName: String?

    public init(_ exports: [NBDExportInfo], defaultName: String? = nil) {
        self.exports = exports
        self.defaultName = defaultName
    }

    public func export(named name: String) -> NBDExportInfo? {
        if let found = exports.first(where: { $0.name.utf8.elementsEqual(name.utf8) }) {
            return found
        }
        guard name.isEmpty, let defaultName, !defaultName.isEmpty else { return nil }
        return export(named: defaultName)
    }
}

/// What a finished handshake agreed on.
public struct NBDSession: Hashable, Sendable {
    /// The export as it was told to the client.
    public var export: NBDExportInfo
    public var mode: NBDReplyMode
    /// The transmission flags as the client was told them.
    public var flags: NBDTransmissionFlags
    /// Contexts that the client selected for block status, by id: indices into
    /// ``NBDExportInfo/contexts``, ascending.
    public var contextIDs: [UInt32]
    /// What the client promised to align its requests to; 1 where it did not ask for block sizes.
    public var alignment: Int

    public init(
        export: NBDExportInfo, mode: NBDReplyMode, contextIDs: [UInt32] = [], alignment: Int = 1
    ) {
        self.export = export
        self.mode = mode
        flags = export.transmissionFlags(for: mode)
        self.contextIDs = contextIDs
        self.alignment = alignment
    }

    /// The context behind an id that this session selected.
    public func context(_ id: UInt32) -> NBDContext? {
        guard contextIDs.contains(id), Int(id) < export.contexts.count else { return nil }
        return export.contexts[Int(id)]
    }
}
