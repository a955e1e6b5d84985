import BlockCore
import BlockGraph
import QMP

/// `raw`: the bytes of its child as they are, or a window of them.
///
/// Options: `offset`, where the window begins, and `size`, how long it is; both multiples of 512.
/// A node of this driver stays raw whatever a guest writes to it: nothing here is ever probed.
/// Where the command line found out that the image is raw from its first bytes (`x-probed`), writes
/// that would make them another format's are refused: the next command would take it for that.
public final class RawDriver: BlockDriver, @unchecked Sendable {
    private let node: BlockNode
    private let file: Edge
    private var window: Window
    private let header: HeaderGuard?

    private var offset: Int { window.offset }

    private init(_ node: BlockNode, _ file: Edge, _ window: Window, header: HeaderGuard?) {
        self.node = node
        self.file = file
        self.window = window
        self.header = header
        takeSize()
    }

    static func open(_ opening: NodeOpening) async throws(BlockError) -> RawDriver {
        let window = try Window(opening.options)
        let isProbed = try opening.options.bool("x-probed") ?? false
        let file = try await opening.requiredChild("file", roles: [.data, .primary])
        try window.check(against: file)
        return RawDriver(
            opening.node, file, window, header: isProbed ? HeaderGuard(opening.graph.registry) : nil
        )
    }

    /// The part of the child that the node presents.
    private struct Window {
        let offset: Int
        /// Set where it does not go on to the end of the child.
        let size: Int?

        init(_ options: OptionReader) throws(BlockError) {
            offset = try options.size("offset") ?? 0
            size = try options.size("size")
            guard offset >= 0, offset.isAligned(to: 512) else {
                throw BlockError(
                    .invalidArgument, "'offset' must be a multiple of 512, not \(offset)")
            }
            if let size, size < 0 || !size.isAligned(to: 512) {
                throw BlockError(.invalidArgument, "'size' must be a multiple of 512, not \(size)")
            }
        }

        func check(against file: Edge) throws(BlockError) {
            guard let end = offset.adding(size ?? 0), end <= file.size else {
                let part = size.map { "the part of \($0) bytes from \(offset) on reaches" }
                throw BlockError(
                    .invalidArgument,
                    "\(part ?? "the offset \(offset) is") past the end of "
                        + "'\(file.node.driver.filename)', which has \(file.size) bytes")
            }
        }

        func size(in file: Edge) -> Int { size ?? max(0, file.size - offset) }
    }

    /// The window can be another one, where the users do not mind another size.
    public func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening {
        let window = try Window(reopening.options)
        try reopening.requireUnchanged("x-probed")
        try window.check(against: file)
        guard window.size(in: file) == node.size || node.cumulativeAccess.shares.contains(.resize)
        else {
            throw BlockError(
                .permissionDenied,
                "its size would change, which not all of its users share: "
                    + node.holders.joined(separator: ", "))
        }
        if window.offset != self.window.offset {
            for edge in node.parents { try edge.checkOtherBytes() }
        }
        var result = DriverReopening()
        result.commit = {
            self.window = window
            self.takeSize()
        }
        return result
    }

    private func takeSize() {
        node.size = window.size(in: file)
        var limits = file.node.limits
        // A window that begins off the child's alignment is aligned by the child's edge.
        while !offset.isAligned(to: limits.requestAlignment) { limits.requestAlignment /= 2 }
        node.limits = limits
    }

    public var wholeChild: Edge? { window.offset == 0 && window.size == nil ? file : nil }

    public var shownChild: (edge: Edge, offset: Int)? { (file, window.offset) }

    public func childResized(_ edge: Edge) {
        takeSize()
    }

    public func childLimitsChanged(_ edge: Edge) {
        takeSize()
    }

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        await file.reached(.readAIO)
        try await file.read(self.offset + offset, into: vector, flags)
    }

    public func readNow(_ offset: Int, into vector: IOVector) -> Bool {
        file.readNow(self.offset + offset, into: vector)
    }

    public func writeNow(_ offset: Int, from vector: IOVector) -> Bool {
        if header != nil, offset < HeaderGuard.byteCount { return false }
        return file.writeNow(self.offset + offset, from: vector)
    }

    public var supportsFUA: Bool { true }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        await file.reached(.writeAIO)
        if let header, offset < HeaderGuard.byteCount {
            try await header.write(offset, from: vector, flags, to: file, at: self.offset)
            return
        }
        try await file.write(self.offset + offset, from: vector, flags)
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await file.writeZeroes(ByteRange(offset + range.offset, range.count), flags)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        try await file.discard(ByteRange(offset + range.offset, range.count))
    }

    public func locate(_ range: ByteRange) throws(BlockError) -> StoredRange {
        try file.locate(ByteRange(offset + range.offset, range.count))
    }

    public func copyRange(
        from stored: StoredRange, to offset: Int, _ method: CopyMethod
    ) async throws(BlockError) {
        if header != nil, offset < HeaderGuard.byteCount {
            throw BlockError(.unsupported, "the beginning of a raw image is looked at first")
        }
        try await file.copyRange(from: stored, to: self.offset + offset, method)
    }

    public func flush() async throws(BlockError) {
        try await file.flush()
    }

    public func readMachineState(
        _ offset: Int, into vector: IOVector
    ) async throws(BlockError) {
        try await file.readMachineState(offset, into: vector)
    }

    public func writeMachineState(
        _ offset: Int, from vector: IOVector
    ) async throws(BlockError) {
        try await file.writeMachineState(offset, from: vector)
    }

    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        let inFile = ByteRange(offset + range.offset, range.count)
        guard inFile.offset < file.size, file.node.hasLayersBelow else {
            return try await file.forwardStatus(inFile, precise: precise, into: answer)
        }
        // What an image shows of its backing image are bytes of this disk, which has no layers.
        try await file.chainStatus(
            ByteRange(inFile.offset, min(inFile.count, file.size - inFile.offset)),
            precise: precise, into: answer)
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        guard window.size == nil else {
            throw BlockError(
                .unsupported, "a raw node with a fixed 'size' cannot be resized",
                remedy: "open it without 'size'")
        }
        guard let end = offset.adding(size), end <= Limits.nodeSizeMax else {
            throw BlockError(.invalidArgument, "a size of \(size) bytes is out of bounds")
        }
        try await file.resize(to: end, preallocation)
    }

    public var filename: String { file.node.driver.filename }
}

extension RawDriver {
    public static let driver = DriverDescription(
        name: "raw", kind: .format,
        open: { opening throws(BlockError) in try await RawDriver.open(opening) },
        create: { creation throws(BlockError) in try await create(creation) },
        measure: { options throws(BlockError) in try measure(options) })

    /// The file is as long as the disk, whatever is in it.
    private static func measure(_ options: OptionReader) throws(BlockError) -> StorageNeed {
        guard let size = try options.size("size") else {
            throw BlockError(.invalidArgument, "option 'size' is missing")
        }
        _ = try options.enumeration("preallocation", as: Preallocation.self)
        try options.finish()
        return StorageNeed(fixedBytes: size, unit: 0, fullBytes: size)
    }

    /// Making a raw image is giving its storage the size.
    private static func create(_ creation: ImageCreation) async throws(BlockError) {
        guard let size = try creation.options.size("size") else {
            throw BlockError(.invalidArgument, "option 'size' is missing")
        }
        let preallocation =
            try creation.options.enumeration("preallocation", as: Preallocation.self) ?? .off
        _ = try creation.options.value("file")
        try creation.options.finish()
        let target = try await creation.target("file")
        try await target.resize(to: size, preallocation)
        try await target.flush()
    }
}
