import BlockCore
import BlockGraph
import QMP

/// `compact`: rewrites an image without the space that it does not need, and proves the result before
/// it takes the image's place.
///
/// 1. The image is held: nobody writes it until the end.
/// 2. A new image with the same properties is made beside it (`NAME.merino-partial`), and the data copied;
///    what reads as zeroes is not stored. Dirty bitmaps go with it.
/// 3. Both are compared, backing images included.
/// 4. The new image is made durable and takes the name in one step.
///
/// Until the last step the image is as it was; a failure or a signal removes what is unfinished.
public struct ImageCompact: Sendable {
    public var source: ImageSource
    /// Store the data compressed.
    public var compresses = false

    /// Bytes on storage.
    public struct Result: Sendable, Equatable {
        public let before: Int
        public let after: Int
        /// The new image is no smaller: the old one stayed.
        public var isUnchanged: Bool { after >= before }
    }

    public init(_ source: ImageSource) {
        self.source = source
    }

    /// - Parameter unfinished: has the file to be removed when a signal ends the work.
    /// - Throws: `unsupported` for images that hold more than a disk's data; `corrupt` when the copy is
    ///   not the same, which only broken storage explains. The image is as it was.
    public func run(
        in session: ToolSession, progress: Progress, unfinished: UnfinishedFile
    ) async throws(BlockError) -> Result {
        guard !source.isOptions, !ImageName.hasProtocol(source.name) else {
            throw BlockError(
                .unsupported, "only image files can be compacted: '\(source.name)' is none",
                remedy: "name the file, and its format with -f")
        }
        var alone = source
        alone.withoutBacking = true
        let holder = try await session.use(
            alone, as: "compaction",
            Access(uses: .consistentRead, shares: .consistentRead))
        do throws(BlockError) {
            let old = try await ImageInfo(of: holder.node, filename: source.name)
            try Self.check(old)
            let path = try unfinished.begin(source.name, besides: session.usedFiles)
            guard path != source.name else {
                throw BlockError(
                    .unsupported,
                    "'\(source.name)' cannot be replaced: it is no regular file with "
                        + "one name in a folder that can be written")
            }
            let result = try await rewrite(old, to: path, in: session, progress)
            if result.isUnchanged {
                unfinished.discard()
            } else {
                try unfinished.commit(to: source.name, durably: true)
            }
            try await session.graph.detach(holder)
            return result
        } catch {
            unfinished.discard()
            throw error
        }
    }

    /// What a rewritten image would lose, or what must be looked at first.
    private static func check(_ image: ImageInfo) throws(BlockError) {
        guard image.format == "raw" || image.format == "qcow2" else {
            throw BlockError(
                .unsupported, "images of format '\(image.format)' are not compacted",
                remedy: "convert the image")
        }
        guard image.snapshots.isEmpty else {
            throw BlockError(
                .unsupported,
                "the image has internal snapshots: a copy would not share its data with them, and "
                    + "lose what they hold of a machine's state",
                remedy: "delete them first, or keep them with copies made by convert -l")
        }
        guard !image.isDirty else {
            throw BlockError(
                .unsupported, "the image was not closed properly", remedy: "check -r all first")
        }
        guard image.backingName == nil || image.backingFormat != nil else {
            throw BlockError(
                .unsupported, "the image does not say which format its backing image has",
                remedy: "rebase -u -b NAME -F FORMAT tells it")
        }
        let data = image.specific?["data"]
        if data?["data-file-raw"] != nil {
            throw BlockError(
                .unsupported,
                "the image's data is in an external data file, each byte at its place in the disk: "
                    + "there is nothing to move together",
                remedy: "discard what is not needed, as fstrim in the guest does")
        }
        if data?["encrypt"] != nil {
            throw BlockError(
                .unsupported,
                "the image is encrypted: a copy would have a key of its own, and lose the key slots",
                remedy: "convert the image, with the keys that the copy is to have")
        }
        try checkBitmaps(data)
        if data?["corrupt"] == .bool(true) {
            throw BlockError(.corrupt, "the image is marked corrupt", remedy: "check -r all first")
        }
    }

    /// - Throws: `corrupt` for those whose bits say nothing.
    private static func checkBitmaps(_ data: JSONValue?) throws(BlockError) {
        guard case .array(let list)? = data?["bitmaps"] else { return }
        for bitmap in list {
            guard case .array(let flags)? = bitmap["flags"], flags.contains("in-use"),
                case .string(let name)? = bitmap["name"]
            else { continue }
            throw BlockError(
                .corrupt, "the dirty bitmap '\(name)' is inconsistent and cannot be kept",
                remedy: "remove it with 'bitmap --remove'")
        }
    }

    private func rewrite(
        _ old: ImageInfo, to path: String, in session: ToolSession, _ progress: Progress
    ) async throws(BlockError) -> Result {
        var create = ImageCreate(path)
        create.shownName = source.name
        create.format = old.format
        create.options = Self.options(of: old)
        create.backing = old.backingName
        create.backingFormat = old.backingFormat
        create.size = old.virtualSize
        try await create.run(in: session) { _ in }

        var convert = ImageConvert()
        var known = source
        known.format = old.format
        convert.sources = [known]
        convert.target = path
        convert.targetFormat = old.format
        convert.targetCache = .writeback
        convert.creates = false
        convert.backing = old.backingName
        convert.backingFormat = old.backingFormat
        convert.compresses = compresses
        let bitmaps = old.specific?["data"]?["bitmaps"]
        convert.copiesBitmaps = bitmaps != nil
        try await convert.run(in: session, progress: progress, unfinished: UnfinishedFile())

        let new = ImageSource(path, format: old.format)
        try await verify(known, new, in: session)
        let after = try await ImageInfo.gather(new, chain: false, in: session)[0]
        guard after.specific?["data"]?["bitmaps"] == bitmaps else {
            throw BlockError(
                .corrupt, "the rewritten image has other dirty bitmaps",
                remedy: "the image is as it was; check the storage")
        }
        return Result(before: old.actualSize ?? 0, after: after.actualSize ?? 0)
    }

    /// The properties that `create` takes.
    private static func options(of image: ImageInfo) -> [String] {
        guard image.format == "qcow2", case .object(let data)? = image.specific?["data"] else {
            return []
        }
        var options = ["cluster_size=\(image.clusterSize)"]
        for (key, option) in [
            ("compat", "compat"), ("refcount-bits", "refcount_bits"),
            ("lazy-refcounts", "lazy_refcounts"), ("compression-type", "compression_type"),
            ("extended-l2", "extended_l2"),
        ] {
            switch data[key] {
            case .string(let text)?: options.append("\(option)=\(text)")
            case .integer(let number)?: options.append("\(option)=\(number)")
            case .bool(let flag)?: options.append("\(option)=\(flag ? "on" : "off")")
            default: break
            }
        }
        // Version 2 has one width and one way of compressing, and takes no word about them.
        let isOld = data["compat"] == "0.10"
        let kept = options.filter { !isOld || $0.hasPrefix("c") && !$0.hasPrefix("compression") }
        return [kept.joined(separator: ",")]
    }

    private func verify(
        _ old: ImageSource, _ new: ImageSource, in session: ToolSession
    ) async throws(BlockError) {
        let result: ImageCompare.Result
        do throws(ImageCompare.Failure) {
            result = try await ImageCompare(old, new).run(in: session, progress: Progress())
        } catch {
            throw error.error
        }
        guard result == .identical(sizesDiffer: false) else {
            throw BlockError(
                .corrupt,
                "the rewritten image is not the same: "
                    + result.text.split(separator: "\n").joined(separator: " "),
                remedy: "the image is as it was; check the storage")
        }
    }
}
