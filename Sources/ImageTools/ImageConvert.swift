import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols
import QMP

/// `convert`: copies one image, or several one after the other, into a new image or an existing one.
public struct ImageConvert: Sendable {
    public var sources: [ImageSource] = []
    public var target = ""
    public var targetFormat = "raw" {
        didSet { namesTargetFormat = true }
    }
    private var namesTargetFormat = false
    /// The target is given as node options (`--target-image-opts`).
    public var targetIsOptions = false
    public var targetCache = CacheMode.unsafe
    /// `key=value,…`, each as often as the option was given.
    public var options: [String] = []
    public var backing: String?
    public var backingFormat: String?
    /// Make the target; else it is there already (`-n`).
    public var creates = true
    public var targetIsZero = false
    public var compresses = false
    /// Zeroes of at least this many bytes are not stored; 0: everything is.
    public var sparseBytes: Int?
    public var workerCount = 8
    public var outOfOrder = false
    /// Bytes a second; 0 for no limit.
    public var rate = 0
    /// Have the storage copy (`-C`).
    public var offloads = false
    public var salvages = false
    public var copiesBitmaps = false
    public var skipsBrokenBitmaps = false
    public var snapshot: String?
    /// Told of what was lost in salvaging.
    public var warn: @Sendable (String) -> Void = { _ in }

    static let sparseBytesDefault = 4096
    static let sparseBytesMax = 16 << 20
    static let workerCountMax = 16

    /// What `--object` makes: secrets that the target's options name.
    public var objects: [String] = []

    public init() {}

    /// What there is for `-o`.
    public func help() throws(BlockError) -> String {
        try creation(at: target).help()
    }

    /// Whether `-o help` was asked for.
    public var wantsHelp: Bool { creation(at: target).wantsHelp }

    private func creation(at path: String) -> ImageCreate {
        var create = ImageCreate(path)
        create.shownName = target
        create.format = targetFormat
        create.options = options
        create.backing = backing
        create.backingFormat = backingFormat
        create.objects = objects
        return create
    }

    // MARK: Checks

    /// - Throws: `invalidArgument` for options that exclude each other.
    public func check() throws(BlockError) {
        try checkTarget()
        try checkCopying()
        if compresses,
            options.contains(where: { $0.contains("preallocation=") && !$0.contains("=off") })
        {
            throw BlockError(.invalidArgument, "-c and preallocation exclude each other")
        }
        let backing = try targetBacking()
        guard sources.count == 1 || backing == nil else {
            throw BlockError(
                .invalidArgument,
                "a backing image makes no sense for a target that several sources are joined in")
        }
        guard sources.count == 1 || snapshot == nil, sources.count == 1 || !copiesBitmaps else {
            throw BlockError(
                .invalidArgument, "snapshots and bitmaps cannot be taken from several sources")
        }
    }

    /// The backing image that the target is to have, by `-B` and `-F` or by creation options.
    private func targetBacking() throws(BlockError) -> (name: String, format: String?)? {
        let values = try creates ? creation(at: target).readOptions() : [:]
        guard let name = backing ?? values["backing_file"] else { return nil }
        return (name, backingFormat ?? values["backing_fmt"])
    }

    private func checkTarget() throws(BlockError) {
        guard creates || options.isEmpty else {
            throw BlockError(.invalidArgument, "-o has no effect without making the target (-n)")
        }
        guard !creates || !targetIsZero else {
            throw BlockError(.invalidArgument, "--target-is-zero needs -n")
        }
        guard !creates || !targetIsOptions else {
            throw BlockError(.invalidArgument, "--target-image-opts needs -n")
        }
        guard !targetIsOptions || !namesTargetFormat else {
            throw BlockError(
                .invalidArgument, "--target-image-opts and -O exclude each other",
                remedy: "name the format in the options, as in driver=qcow2")
        }
        let isOverlay = try targetBacking() != nil
        guard !targetIsZero || !isOverlay else {
            throw BlockError(
                .invalidArgument, "--target-is-zero and a backing image exclude each other")
        }
        if creates, let backing = try targetBacking(), backing.format == nil {
            throw BlockError(
                .invalidArgument, "a backing image needs its format", remedy: "give it with -F")
        }
        guard isOverlay || backingFormat == nil else {
            throw BlockError(
                .invalidArgument, "-F needs a backing image", remedy: "give it with -B")
        }
    }

    private func checkCopying() throws(BlockError) {
        guard workerCount >= 1, workerCount <= Self.workerCountMax else {
            throw BlockError(
                .invalidArgument,
                "the number of parallel workers is 1 to \(Self.workerCountMax), not \(workerCount)")
        }
        if let sparseBytes {
            guard sparseBytes % 512 == 0, sparseBytes <= Self.sparseBytesMax else {
                throw BlockError(
                    .invalidArgument,
                    "a sparse size is a multiple of 512 up to \(Self.sparseBytesMax), not "
                        + "\(sparseBytes)", remedy: "0 allocates the target fully")
            }
        }
        guard !copiesBitmaps || !creates || targetFormat == "qcow2" else {
            throw Self.noBitmaps(targetFormat)
        }
        guard !skipsBrokenBitmaps || copiesBitmaps else {
            throw BlockError(.invalidArgument, "--skip-broken-bitmaps needs --bitmaps")
        }
        // Found out before a target is touched, which may hold something.
        guard !compresses || !creates || targetFormat == "qcow2" else {
            throw BlockError(
                .unsupported, "images of format '\(targetFormat)' are not compressed",
                remedy: "use -O qcow2")
        }
        if offloads {
            for (isGiven, what) in [
                (sparseBytes != nil, "-S"), (compresses, "-c"), (salvages, "--salvage"),
            ] where isGiven {
                throw BlockError(
                    .invalidArgument,
                    "-C and \(what) exclude each other: what the storage copies is "
                        + "not looked at")
            }
        }
    }

    // MARK: Run

    /// Converts.
    ///
    /// - Parameter unfinished: has the file that is to be removed when a signal ends the work.
    /// - Throws: once a target that was being made is removed.
    public func run(
        in session: ToolSession, progress: Progress, unfinished: UnfinishedFile
    ) async throws(BlockError) {
        try check()
        do throws(BlockError) {
            let users = try await openSources(in: session)
            let source = try CopySource(users, layers: try targetBacking() == nil ? nil : 1)
            guard let first = users.first else {
                throw BlockError(.invalidArgument, "there is nothing to convert")
            }
            let bitmaps = try await bitmaps(of: first.node)
            try await convert(source, bitmaps, in: session, progress, unfinished)
            for user in users { try await session.graph.detach(user) }
        } catch {
            unfinished.discard()
            throw error
        }
    }

    private func openSources(in session: ToolSession) async throws(BlockError) -> [Edge] {
        var users: [Edge] = []
        for source in sources {
            let user = "conversion of '\(source.name)'"
            // Nobody else may change it meanwhile.
            let access = Access(
                uses: .consistentRead,
                shares: source.sharesAll ? .all : [.consistentRead, .writeUnchanged])
            if let snapshot {
                let node = try await session.openSnapshot(
                    snapshot, of: try await session.open(source))
                defer { node.release("command") }
                users.append(try session.graph.attach(NamedUser(user), to: node, access))
            } else {
                users.append(try await session.use(source, as: user, access))
            }
        }
        return users
    }

    private func convert(
        _ source: CopySource, _ bitmaps: [DirtyBitmap], in session: ToolSession,
        _ progress: Progress,
        _ unfinished: UnfinishedFile
    ) async throws(BlockError) {
        var path = target
        var guardian: Edge?
        if creates {
            (path, guardian) = try await session.beginTarget(target, unfinished)
            try await create(path, source.size, in: session, unfinished)
        }
        let user = try await openTarget(path, in: session)
        guard user.size >= source.size else {
            throw BlockError(
                .invalidArgument,
                "the target '\(target)' has \(user.size) bytes, the source \(source.size)",
                remedy: "make it larger first")
        }
        try check(bitmaps, on: user.node)
        try await copy(source, to: user, progress)
        try await copy(bitmaps, to: user.node)
        try await user.flush()
        try await session.graph.detach(user)
        if let guardian { try await session.graph.detach(guardian) }
        try unfinished.commit(to: target, durably: !targetCache.ignoresFlush)
    }

    private func create(
        _ path: String, _ size: Int, in session: ToolSession, _ unfinished: UnfinishedFile
    ) async throws(BlockError) {
        var create = creation(at: path)
        create.unfinished = unfinished
        if try create.readOptions()["size"] != nil {
            warn("-o size has no effect: the target is as long as the sources")
        }
        create.size = size
        create.ignoresSizeOption = true
        try await create.run(in: session) { _ in }
    }

    /// Options of the target's backing image, where the image, opened under the name it has until it is
    /// whole, would look for it in another folder than under its own.
    private func backingOptions(
        of path: String, in session: ToolSession
    ) async throws(BlockError) -> JSONValue? {
        guard creates, path != target else { return nil }
        guard let backing = try targetBacking() else { return nil }
        let found = ImageName.resolve(backing.name, besides: target)
        guard found != ImageName.resolve(backing.name, besides: path) else { return nil }
        let source = ImageSource(found, format: backing.format)
        return try await session.options(for: source)
    }

    private func openTarget(_ path: String, in session: ToolSession) async throws(BlockError)
        -> Edge
    {
        var target = ImageSource(
            path, format: targetIsOptions ? nil : targetFormat, isOptions: targetIsOptions)
        target.isWritable = true
        target.objects = objects
        if creates { target.more = try creation(at: path).openingOptions() }
        target.cache = targetCache
        target.discards = true
        target.backingOptions = try await backingOptions(of: path, in: session)
        let user = try await session.use(
            target, as: "conversion",
            Access(uses: [.consistentRead, .write, .resize], shares: [.consistentRead]))
        user.isWriteThrough = targetCache.isWriteThrough
        return user
    }

    private func copy(
        _ source: CopySource, to user: Edge, _ progress: Progress
    ) async throws(BlockError) {
        var settings = ImageCopier.Settings()
        settings.workerCount = workerCount
        settings.outOfOrder = outOfOrder
        settings.rate = rate
        settings.salvages = salvages
        settings.warn = warn
        // Sharing blocks is always better than copying them; copies that nobody looks at for zeroes are
        // made on demand only.
        if offloads {
            settings.offload = .copy
        } else if sparseBytes != 0, !salvages {
            settings.offload = .share
        }
        let target: CopyTarget
        if compresses {
            target = try await compressing(user, &settings)
        } else {
            target = CopyTarget(
                user, isZero: try await isZero(user),
                sparseBytes: sparseBytes ?? Self.sparseBytesDefault,
                keepsAllocation: try isPreallocated)
        }
        progress.begin(source.size)
        try await ImageCopier(from: source, to: target, settings, progress).run()
        progress.finish()
    }

    /// Clusters are compressed whole: items hold whole ones, and a cluster is zeroes or is not.
    private func compressing(
        _ user: Edge, _ settings: inout ImageCopier.Settings
    ) async throws(BlockError) -> CopyTarget {
        let cluster = user.node.limits.allocationUnit
        guard user.node.driver.supportsCompressedWrites, cluster.isPowerOfTwo,
            cluster <= ImageCopier.itemBytesMax
        else {
            throw BlockError(
                .unsupported,
                "images of format '\(user.node.description.name)' are not compressed",
                remedy: "use -O qcow2")
        }
        settings.unit = cluster
        settings.offload = nil
        return CopyTarget(
            user, isZero: try await isZero(user), sparseBytes: sparseBytes == 0 ? 0 : cluster,
            .compressed)
    }

    /// Whether the target was made with space reserved, which it keeps.
    private var isPreallocated: Bool {
        get throws(BlockError) {
            guard creates else { return false }
            return try creation(at: target).readOptions()["preallocation"] ?? "off" != "off"
        }
    }

    /// Whether zeroes need not be written.
    private func isZero(_ user: Edge) async throws(BlockError) -> Bool {
        if targetIsZero { return true }
        if user.node.layerCount > 1 { return false }
        // A backing file that was left out shows again where nothing is written.
        if try await user.node.driver.information.backingName != nil { return false }
        // What was reserved in a new file reads as zeroes, unless it is decrypted first.
        if try isPreallocated, try await user.node.isOfPlainFiles { return true }
        return try await user.isKnownZero()
    }
}

extension ToolSession {
    /// Begins a new target.
    ///
    /// - Returns: the path to write it to, and the use that keeps others from what stands there, where
    ///   that stays until the end.
    /// - Throws: `unsupported` for a name that is not a file's, and a file that is no storage.
    func beginTarget(
        _ name: String, _ unfinished: UnfinishedFile
    ) async throws(BlockError) -> (path: String, guardian: Edge?) {
        let target = try ImageName.newFile(name)
        try UnfinishedFile.checkKind(target)
        let sources = usedFiles
        let guardian = try await holdOldTarget(target)
        let path = try unfinished.begin(target, besides: sources)
        guard unfinished.isInPlace, let guardian else { return (path, guardian) }
        // Making the image takes the locks itself.
        try await graph.detach(guardian)
        return (path, nil)
    }

    /// The local files that are open.
    var usedFiles: Set<FileIdentity> {
        var result: Set<FileIdentity> = []
        for case let driver as FileDriver in graph.nodes.map(\.driver) {
            if let identity = FileIdentity(ofFileAt: driver.filename) { result.insert(identity) }
        }
        return result
    }

    /// Keeps an existing target from others, and finds out whether it is a source or in use, before
    /// anything takes its place.
    private func holdOldTarget(_ target: String) async throws(BlockError) -> Edge? {
        var old = ImageSource(target, format: "raw")
        old.isWritable = true
        do throws(BlockError) {
            return try await use(
                old, as: "image creation", Access(uses: [.write, .resize], shares: []))
        } catch  where error.code == .notFound {
            return nil
        }
    }
}

extension BlockNode {
    /// Whether all that it stands on are files, whose bytes it shows as they are.
    fileprivate var isOfPlainFiles: Bool {
        get async throws(BlockError) {
            guard try await !driver.information.isEncrypted else { return false }
            var rest = [self]
            while let node = rest.popLast() {
                if node.description.kind == .storage, node.description.name != "file" {
                    return false
                }
                rest.append(contentsOf: node.children.map(\.node))
            }
            return true
        }
    }
}
