import BlockCore
import BlockFormats
import BlockGraph
import BlockProtocols
import QMP

/// `compact`: rewrites an image without the space that it does not need, and proves the result before
/// it takes the image's place.
///
/// 1. The image is held: nobody writes it until the end.
/// 2. A new file is made beside it (`NAME.merino-partial`). A qcow2 image is written to it cluster by
///    cluster (`QCOW2Rewrite`): what its snapshots share they share there too, and key slots, bitmaps and
///    all that the header says go with it. Of a raw image the data is copied, without its zeroes.
/// 3. Both are compared, and the new image is checked.
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
    /// - Throws: `unsupported` for what is no qcow2 or raw image in a file; `permissionDenied` for an
    ///   encrypted image whose key is needed and missing; `corrupt` when the copy is
    ///   not the same, which only broken storage explains. The image is as it was.
    public func run(
        in session: ToolSession, progress: Progress, unfinished: UnfinishedFile
    ) async throws(BlockError) -> Result {
        var alone = source
        alone.withoutBacking = true
        let options = try await session.options(for: alone)
        // An image without its key can be looked at, but not read.
        let holder = try await session.use(
            alone, as: "compaction", Access(uses: [], shares: .consistentRead))
        do throws(BlockError) {
            let file = try Self.file(of: holder.node)
            let path = try unfinished.begin(file.filename, besides: session.usedFiles)
            guard path != file.filename else {
                throw BlockError(
                    .unsupported,
                    "'\(file.filename)' cannot be replaced: it is no regular file with "
                        + "one name in a folder that can be written")
            }
            let before = try await file.allocatedBytes()
            var after = before
            if let image = holder.node.driver as? QCOW2Driver {
                let copy = Copy(image, options, path, session, progress)
                if try await copy.make(compresses: compresses) { after = try await copy.prove() }
            } else {
                after = try await rewriteRaw(file.filename, to: path, in: session, progress)
            }
            progress.finish()
            let result = Result(before: before, after: after)
            if result.isUnchanged {
                unfinished.discard()
            } else {
                try unfinished.commit(to: file.filename, durably: true)
            }
            try await session.graph.detach(holder)
            return result
        } catch {
            unfinished.discard()
            throw error
        }
    }

    /// The file that a new one can take the place of.
    private static func file(of image: BlockNode) throws(BlockError) -> FileDriver {
        let format = image.description.name
        guard image.driver is QCOW2Driver || format == "raw" else {
            throw BlockError(
                .unsupported, "images of format '\(format)' are not compacted",
                remedy: "convert the image")
        }
        guard let file = image.file?.node.driver as? FileDriver else {
            throw BlockError(
                .unsupported,
                "only image files can be compacted: '\(image.driver.filename)' is none",
                remedy: "name the file, and its format with -f")
        }
        return file
    }

    // MARK: raw

    /// - Returns: bytes on storage of the new image.
    private func rewriteRaw(
        _ filename: String, to path: String, in session: ToolSession, _ progress: Progress
    ) async throws(BlockError) -> Int {
        var known = source
        if !known.isOptions, !known.name.hasPrefix("json:") { known.format = "raw" }
        var convert = ImageConvert()
        convert.sources = [known]
        convert.target = path
        convert.targetFormat = "raw"
        convert.targetCache = .writeback
        convert.compresses = compresses
        let info = try await ImageInfo.gather(known, chain: false, in: session)[0]
        var create = ImageCreate(path)
        create.shownName = filename
        create.format = "raw"
        create.size = info.virtualSize
        try await create.run(in: session) { _ in }
        convert.creates = false
        try await convert.run(in: session, progress: progress, unfinished: UnfinishedFile())
        let new = ImageSource(path, format: "raw")
        try await compare(known, new, in: session)
        let after = try await ImageInfo.gather(new, chain: false, in: session)[0]
        return after.actualSize ?? 0
    }

    private func compare(
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

// MARK: qcow2

extension ImageCompact {
    /// A qcow2 image and its copy.
    private struct Copy {
        let image: QCOW2Driver
        /// How the image was opened.
        let options: JSONValue
        let path: String
        let session: ToolSession
        let progress: Progress

        init(
            _ image: QCOW2Driver, _ options: JSONValue, _ path: String, _ session: ToolSession,
            _ progress: Progress
        ) {
            self.image = image
            self.options = options
            self.path = path
            self.session = session
            self.progress = progress
        }

        /// - Returns: `false` where it would be no smaller.
        func make(compresses: Bool) async throws(BlockError) -> Bool {
            // Written once, and read twice: by the copy, and by the comparison.
            progress.begin(2 * image.fileSize)
            let node = try await session.graph.open([
                "driver": "file", "filename": .string(path), "read-only": false,
            ])
            defer { node.release("opening") }
            let target = try session.graph.attach(
                NamedUser("compaction"), to: node,
                Access(uses: [.consistentRead, .write, .resize], shares: .consistentRead))
            do throws(BlockError) {
                let isSmaller = try await image.rewrite(to: target, compresses: compresses) {
                    progress.advance($0)
                }
                try await session.graph.detach(target)
                return isSmaller
            } catch {
                try? await session.graph.detach(target)
                throw error
            }
        }

        /// Compares and checks the copy as it is in the file.
        ///
        /// - Returns: its bytes on storage.
        func prove() async throws(BlockError) -> Int {
            let node = try await session.graph.open(copyOptions())
            defer { node.release("opening") }
            let edge = try session.graph.attach(
                NamedUser("comparison"), to: node, Access(uses: [], shares: .consistentRead))
            guard let copy = node.driver as? QCOW2Driver,
                let file = node.file?.node.driver as? FileDriver
            else { throw BlockError(.corrupt, "the rewritten image is none") }
            try await image.prove(copy) { progress.advance($0) }
            let size = try await file.allocatedBytes()
            try await session.graph.detach(edge)
            let check = try await ImageCheck.run(
                ImageSource(path, format: "qcow2"), repair: [], in: session
            ) { _ in }
            guard let check, check.report.isClean else {
                throw BlockError(
                    .corrupt, "the rewritten image is damaged",
                    remedy: "the image is as it was; check it, and the storage")
            }
            return size
        }

        /// The copy is opened as the image was, by another name.
        private func copyOptions() -> JSONValue {
            guard case .object(var options) = options else { return options }
            options["file"] = ["driver": "file", "filename": .string(path)]
            options["node-name"] = nil
            options["backing"] = .null
            return .object(options)
        }
    }
}
