import BlockCore
import BlockGraph
import BlockIO
import QMP

/// How an image is named and opened on a command line.
public struct ImageSource: Sendable {
    /// A path, `json:{…}`, or with ``isOptions`` node options: `driver=qcow2,file.filename=x`.
    public var name: String
    public var isOptions = false
    /// `nil`: found out from the image's first bytes.
    public var format: String?
    public var isWritable = false
    public var cache = CacheMode.writeback
    public var discards = false
    public var zeroDetection: String?
    public var asynchronousIO: String?
    /// Writes go to a temporary image above it, which is gone when it is closed (`-s`).
    public var isTemporary = false
    /// What is read from a backing image is kept in the image (`-C`).
    public var copiesOnRead = false
    /// Others may write meanwhile (`-U`).
    public var sharesAll = false
    /// Called when a writable image's format was found out to be raw: what a guest writes is held
    /// back then where it would make the image look like another format.
    public var foundRaw: (@Sendable () -> Void)?
    /// What `--object` makes: secrets that the image's options name.
    public var objects: [String] = []
    /// Options of the image's driver, beside those that the name holds.
    public var more = JSONObject()
    /// The image alone: its backing image stays closed.
    public var withoutBacking = false
    /// The image is opened without the key that its options name, to look at what is not encrypted.
    var withoutKey = false
    /// What the image's format was found out to be before, where ``format`` is not given: not looked at
    /// again, but guarded as what is found out.
    var probedFormat: String?
    /// Options of the backing image, instead of what the image says of it.
    var backingOptions: JSONValue?
    /// Nothing that the image names is followed.
    public var isUntrusted = false
    /// The image is opened to be checked, in whatever state it is.
    public var isForCheck = false
    /// The image is opened for what it says of itself: no guest data is read.
    public var isForInformation = false

    public init(_ name: String, format: String? = nil, isOptions: Bool = false) {
        self.name = name
        self.format = format
        self.isOptions = isOptions
    }

    /// What an image's header says of the one below: the options in a `json:` name count, not the format beside
    /// it, as where the image is opened.
    init(_ name: String, formatInHeader format: String?) {
        var format = format
        if case .json = ImageName.kind(name) { format = nil }
        self.init(name, format: format)
    }
}

extension ImageSource {
    /// The options that the name stands for, nested, as they were given; `nil` where it is a file's.
    func givenOptions() throws(BlockError) -> JSONObject? {
        let value: JSONValue
        if isOptions {
            guard format == nil else {
                throw BlockError(
                    .invalidArgument, "--image-opts and a format exclude each other",
                    remedy: "name the format in the options, as in driver=qcow2")
            }
            value = try KeyValue.parse(name)
        } else if case .json(let text) = ImageName.kind(name) {
            value = try JSONParser.parse(text)
        } else {
            return nil
        }
        guard case .object(let options) = try value.nestingDottedKeys() else {
            throw BlockError(.invalidArgument, "an image's options must be an object")
        }
        if let format, case .string(let driver)? = options["driver"], driver != format {
            throw BlockError(
                .invalidArgument,
                "the image's format is given as \(format), and '\(name)' says \(driver)",
                remedy: "give one of them, or both alike")
        }
        return options
    }

    /// What every node that is opened for the image has, where its options do not say otherwise.
    var inherited: NodeOptions {
        var options = NodeOptions()
        options.isUntrusted = isUntrusted
        options.isForCheck = isForCheck
        options.isForInformation = isForInformation
        return options
    }
}

/// The cache modes of QEMU's tools.
public enum CacheMode: String, Sendable, CaseIterable {
    case none, writeback, writethrough, directsync, unsafe

    /// - Throws: `invalidArgument` with the modes there are.
    public init(named name: String) throws(BlockError) {
        // `off` is what `none` was called first.
        guard let mode = name == "off" ? CacheMode.none : CacheMode(rawValue: name) else {
            throw BlockError(
                .invalidArgument, "there is no cache mode '\(name)'",
                remedy: "use none, writeback, writethrough, directsync or unsafe")
        }
        self = mode
    }

    /// Past the host's page cache.
    public var isDirect: Bool { self == .none || self == .directsync }
    public var ignoresFlush: Bool { self == .unsafe }
    /// Every write is durable before it completes.
    public var isWriteThrough: Bool { self == .writethrough || self == .directsync }
}

extension ImageSource {
    /// Reads a discard mode (`-d`, `--discard`).
    public static func discards(mode: String) throws(BlockError) -> Bool {
        switch mode {
        case "unmap", "on": return true
        case "ignore", "off": return false
        default:
            throw BlockError(
                .invalidArgument, "there is no discard mode '\(mode)'",
                remedy: "use ignore or unmap")
        }
    }
}

extension ToolSession {
    /// The node options that open `source`.
    ///
    /// - Throws: also when the format must be found out and the image cannot be read.
    public func options(for source: ImageSource) async throws(BlockError) -> JSONValue {
        try await add(objects: source.objects)
        var options = try await namedOptions(source)
        for (key, value) in source.more.members { options[key] = value }
        setDefault("read-only", .bool(!source.isWritable), in: &options)
        setDefault("discard", source.discards ? "unmap" : "ignore", in: &options)
        if let detection = source.zeroDetection { options["detect-zeroes"] = .string(detection) }
        if source.sharesAll { options["force-share"] = true }
        setDefault(
            "cache",
            [
                "direct": .bool(source.cache.isDirect),
                "no-flush": .bool(source.cache.ignoresFlush),
            ], in: &options)
        if source.withoutBacking, case .string(let name) = options["driver"],
            try Self.registry.driver(named: name).supportsBacking
        {
            options["backing"] = .null
        }
        if let backing = source.backingOptions { options["backing"] = backing }
        if source.withoutKey {
            if options["driver"] == "luks" { options["key-secret"] = nil }
            if options["driver"] == "qcow2" { options["encrypt"] = nil }
        }
        return .object(options)
    }

    /// Guards what was found to be raw, if it is to be written.
    private func guardProbed(_ options: inout JSONObject, _ source: ImageSource) {
        guard source.isWritable, options["driver"] == "raw" else { return }
        options["x-probed"] = true
        source.foundRaw?()
    }

    private func setDefault(_ key: String, _ value: JSONValue, in options: inout JSONObject) {
        if options[key] == nil { options[key] = value }
    }

    /// What the name says: a driver at least.
    private func namedOptions(_ source: ImageSource) async throws(BlockError) -> JSONObject {
        if source.isUntrusted { try checkUntrusted(source) }
        if let given = try source.givenOptions() { return try await completed(given, source) }
        var file = try await fileOptions(source.name)
        if let aio = source.asynchronousIO, file["filename"] != nil { file["aio"] = .string(aio) }
        var options = try await formatted(source.format ?? source.probedFormat, file)
        if source.format == nil { guardProbed(&options, source) }
        return options
    }

    /// An image that is not trusted is a file, and of the format that the user says.
    private func checkUntrusted(_ source: ImageSource) throws(BlockError) {
        if source.isOptions { return }
        guard source.format != nil else {
            throw BlockError(
                .invalidArgument,
                "the format of '\(source.name)' is not given, and it is not trusted",
                remedy: "give it with -f; 'merino inspect' tells what the image looks like")
        }
        guard case .path = ImageName.kind(source.name) else {
            throw BlockError(
                .permissionDenied, "'\(source.name)' is not the name of a file",
                remedy: "put './' in front if it is, or give options with --image-opts")
        }
    }

    /// Adds the drivers that options leave out.
    private func completed(
        _ given: JSONObject, _ source: ImageSource
    ) async throws(BlockError) -> JSONObject {
        var options = given
        if let aio = source.asynchronousIO, case .object(var file)? = options["file"] {
            setDefault("aio", .string(aio), in: &file)
            options["file"] = .object(file)
        }
        if let format = source.format { setDefault("driver", .string(format), in: &options) }
        let isProbed = options["driver"] == nil
        if isProbed, let format = source.probedFormat { options["driver"] = .string(format) }
        options = try await graph.completeDrivers(options, mayProbe: !source.isUntrusted)
        if isProbed { guardProbed(&options, source) }
        return options
    }

    private func fileOptions(_ name: String) async throws(BlockError) -> JSONObject {
        switch ImageName.kind(name) {
        case .path(let path):
            return [
                "driver": .string(await graph.fileDriver(of: path)), "filename": .string(path),
            ]
        case .test:
            return try await testOptions(name)
        case .json:
            throw ImageName.unknownProtocol("json", in: name)
        case .unknown(let scheme):
            throw ImageName.unknownProtocol(scheme, in: name)
        }
    }

    /// Names of nodes for tests: `blkdebug:CONFIG:IMAGE`, `blkverify:RAW:IMAGE`, `null-co://`.
    private func testOptions(_ name: String) async throws(BlockError) -> JSONObject {
        switch name.prefix(while: { $0 != ":" }) {
        case "blkdebug":
            let (config, image) = try halves(name, "blkdebug:CONFIG:IMAGE")
            var options: JSONObject = ["driver": "blkdebug"]
            if !config.isEmpty { options["config"] = .string(config) }
            options["image"] = .object(try await fileOptions(image))
            return options
        case "blkverify":
            let (raw, image) = try halves(name, "blkverify:RAW:IMAGE")
            return [
                "driver": "blkverify", "raw": .object(try await fileOptions(raw)),
                "test": .object(try await formatted(nil, fileOptions(image))),
            ]
        case "null-co": return ["driver": "null-co"]
        default: return ["driver": "null-aio"]
        }
    }

    /// What stands between the first two colons, and behind the second.
    private func halves(
        _ name: String, _ form: String
    ) throws(BlockError) -> (String, String) {
        let parts = name.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
        guard parts.count == 3, !parts[2].isEmpty else {
            throw BlockError(
                .invalidArgument, "'\(name)' names no image", remedy: "write \(form)")
        }
        return (String(parts[1]), String(parts[2]))
    }

    private func formatted(
        _ format: String?, _ file: JSONObject
    ) async throws(BlockError) -> JSONObject {
        var name = format
        if name == nil { name = try await graph.probeFormat(file) }
        // Storage has nothing below it: the file is its own.
        if let name, file["filename"] != nil,
            try Self.registry.driver(named: name).kind == .storage
        {
            var options = file
            options["driver"] = .string(name)
            return options
        }
        return ["driver": .string(name ?? "raw"), "file": .object(file)]
    }

    func isBlockDevice(_ path: String) async throws(BlockError) -> Bool {
        try await graph.isBlockDevice(path)
    }
}
