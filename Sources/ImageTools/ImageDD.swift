import BlockCore
import BlockGraph

/// `dd`: copies a part of an image, in blocks, to a new image.
public struct ImageDD: Sendable {
    public var input: ImageSource?
    public var output: String?
    public var outputFormat = "raw"
    public var blockSize = 512
    /// Blocks of the input that are looked at, those that are skipped included; `nil` for all.
    public var count: Int?
    /// Blocks of the input to leave out.
    public var skip = 0
    /// Bytes that the input is taken to have, where it has more.
    public var inputSize: Int?
    /// Bytes of the new image; `nil` for what is copied.
    public var outputSize: Int?

    static let blockSizeMax = Int(Int32.max)

    public init() {}

    /// Reads operands: `if=…`, `of=…`, `bs=…`, `count=…`, `skip=…`, `isize=…`, `osize=…`.
    ///
    /// - Parameter source: makes the input's source of its name.
    public mutating func take(
        _ operand: String, source: (String) throws(BlockError) -> ImageSource
    ) throws(BlockError) {
        let parts = operand.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else {
            throw BlockError(
                .invalidArgument, "'\(operand)' is no operand", remedy: "as in if=disk.qcow2")
        }
        let value = String(parts[1])
        switch parts[0] {
        case "if": input = try source(value)
        case "of": output = value
        case "bs":
            blockSize = try Self.number(value, "bs")
            guard blockSize >= 1, blockSize <= Self.blockSizeMax else {
                throw BlockError(
                    .invalidArgument, "bs is 1 to \(Self.blockSizeMax), not \(blockSize)")
            }
        case "count": count = try Self.number(value, "count")
        case "skip": skip = try Self.number(value, "skip")
        case "isize": inputSize = try Self.number(value, "isize")
        case "osize": outputSize = try Self.number(value, "osize")
        default:
            throw BlockError(
                .invalidArgument, "there is no operand '\(parts[0])'",
                remedy: "use if, of, bs, count, skip, isize, osize")
        }
    }

    private static func number(_ text: String, _ name: String) throws(BlockError) -> Int {
        guard let number = SizeText.parse(text) else {
            throw BlockError(
                .invalidArgument, "\(name) cannot be '\(text)'",
                remedy: "give a number, or one with k, M, G, T, P or E")
        }
        return number
    }

    /// Copies.
    ///
    /// - Parameter warn: told when there is nothing to copy because more is skipped than there is.
    public func run(
        in session: ToolSession, unfinished: UnfinishedFile, warn: (String) -> Void
    ) async throws(BlockError) {
        guard let input, let output else {
            throw BlockError(
                .invalidArgument, "dd needs an input and an output", remedy: "give if=… and of=…")
        }
        let user = try await session.use(input, as: "dd")
        let end = end(user.size)
        let start = skip.multiplied(by: blockSize) ?? .max
        if start > end { warn("\(input.name): cannot skip to specified offset") }
        let range = ByteRange(from: min(start, end), to: end)
        do throws(BlockError) {
            try await copy(user, range, to: output, in: session, unfinished)
        } catch {
            unfinished.discard()
            throw error
        }
        try await session.graph.detach(user)
    }

    private func end(_ size: Int) -> Int {
        var end = min(size, inputSize ?? size)
        if let count, let bytes = count.multiplied(by: blockSize) { end = min(end, bytes) }
        return end
    }

    private func copy(
        _ user: Edge, _ range: ByteRange, to output: String, in session: ToolSession,
        _ unfinished: UnfinishedFile
    ) async throws(BlockError) {
        let (path, guardian) = try await session.beginTarget(output, unfinished)
        var create = ImageCreate(path)
        create.shownName = output
        create.unfinished = unfinished
        create.format = outputFormat
        create.size = outputSize ?? range.count
        try await create.run(in: session) { _ in }
        var target = ImageSource(path, format: outputFormat)
        target.isWritable = true
        target.discards = true
        let sink = try await session.use(
            target, as: "dd",
            Access(uses: [.consistentRead, .write, .resize], shares: .consistentRead))
        let source = try CopySource(user, range: range)
        let copied = min(range.count, sink.size)
        var settings = ImageCopier.Settings()
        settings.range = ByteRange(0, copied)
        // A device has what it had before.
        let isZero = try await sink.isKnownZero()
        let copier = ImageCopier(
            from: source,
            to: CopyTarget(sink, isZero: isZero, sparseBytes: ImageConvert.sparseBytesDefault),
            settings, Progress())
        try await copier.run()
        try await sink.flush()
        try await session.graph.detach(sink)
        if let guardian { try await session.graph.detach(guardian) }
        try unfinished.commit(to: output, durably: true)
    }
}
