import BlockCore
import BlockGraph
import BlockIO
import QMP

/// `create`: makes a new image file.
public struct ImageCreate: Sendable {
    public var name: String
    public var format = "raw"
    /// Bytes; `nil`: from the options, or the backing image's.
    public var size: Int?
    /// `key=value,…`, each as often as the option was given.
    public var options: [String] = []
    public var backing: String?
    public var backingFormat: String?
    /// What `--object` makes: secrets that options name.
    public var objects: [String] = []
    /// Take the backing image's name as it is, without opening it (`-u`).
    public var trustsBacking = false
    /// ``size`` counts whatever the options say.
    var ignoresSizeOption = false
    /// What errors call the image, where that is not its path.
    var shownName: String?
    /// Told of the first change to what stands there.
    var unfinished: UnfinishedFile?

    public init(_ name: String) {
        self.name = name
    }

    /// What there is for `-o`, one line each, as `-o help` prints it.
    public func help() throws(BlockError) -> String {
        _ = try creator()
        return "Supported options:\n" + CreationOption.helpLines(CreationOption.options(of: format))
    }

    /// Whether `-o help` was asked for.
    public var wantsHelp: Bool {
        options.contains { $0.split(separator: ",").contains { $0 == "help" || $0 == "?" } }
    }

    /// Makes the image.
    ///
    /// - Parameter announce: called with the summary line before anything is made.
    /// - Throws: also when there is no size, and none can be taken from a backing image.
    public func run(
        in session: ToolSession, announce: (String) -> Void
    ) async throws(BlockError) {
        do throws(BlockError) {
            try await make(in: session, announce)
        } catch {
            throw error.doing("cannot create '\(shownName ?? name)'")
        }
    }

    private func make(
        in session: ToolSession, _ announce: (String) -> Void
    ) async throws(BlockError) {
        let path = try ImageName.newFile(name)
        try UnfinishedFile.checkKind(path)
        try await session.add(objects: objects)
        let creator = try creator()
        var values = try readOptions()
        if let backing { values["backing_file"] = backing }
        if let backingFormat { values["backing_fmt"] = backingFormat }
        if let size {
            guard ignoresSizeOption || values["size"] == nil else {
                throw BlockError(.invalidArgument, "the image's size is given twice")
            }
            values["size"] = String(size)
        }
        if let backing = values["backing_file"] {
            try await settle(backing: backing, &values, in: session)
        }
        guard let text = values["size"], let size = Int(text), size >= 0 else {
            throw BlockError(.invalidArgument, "an image needs a size", remedy: "give one: 10G")
        }
        announce(summary(values))
        // Sectors are what every reader of an image can count on.
        guard let rounded = size.roundedUp(to: 512), rounded <= Limits.nodeSizeMax else {
            throw BlockError(
                .invalidArgument, "a size of \(size) bytes is too large",
                remedy: "\(Limits.nodeSizeMax) bytes are the most")
        }
        values["size"] = String(rounded)
        try await write(values, to: path, creator, in: session)
    }

    private typealias Create = @Sendable (ImageCreation) async throws(BlockError) -> Void

    /// The image is its storage, without a format in it.
    private var isRaw: Bool { ["raw", "file", "host_device"].contains(format) }

    private func creator() throws(BlockError) -> Create {
        guard let create = try ToolSession.registry.driver(named: isRaw ? "raw" : format).create
        else {
            throw BlockError(
                .unsupported, "images of format '\(format)' cannot be created",
                remedy: "use -f raw or -f qcow2")
        }
        return create
    }

    /// The options by name, each in its plainest form.
    func readOptions() throws(BlockError) -> [String: String] {
        let known = CreationOption.options(of: format)
        var result: [String: String] = [:]
        for text in options {
            for (option, value) in try CreationOption.read(text, known, format) {
                result[option.name] = try option.normalized(value)
            }
        }
        return result
    }

    /// Checks the backing image and takes the size from it, where none is given.
    private func settle(
        backing: String, _ values: inout [String: String], in session: ToolSession
    ) async throws(BlockError) {
        guard try ToolSession.registry.driver(named: format).supportsBacking else {
            throw BlockError(
                .unsupported, "format '\(format)' has no backing images", remedy: "use -f qcow2")
        }
        let named = shownName ?? name
        guard backing != named else {
            throw BlockError(.invalidArgument, "an image cannot be its own backing image")
        }
        if let format = values["backing_fmt"] {
            _ = try ToolSession.registry.driver(named: format)
        } else if trustsBacking {
            throw BlockError(
                .invalidArgument, "the backing image's format is not given",
                remedy: "give it with -F")
        }
        if trustsBacking { return }
        let path = ImageName.resolve(backing, besides: named)
        var source = ImageSource(path, format: values["backing_fmt"])
        source.objects = objects
        guard source.format != nil else {
            let found = try await detectedFormat(source, in: session)
            throw BlockError(
                .invalidArgument, "the backing image's format is not given",
                remedy: "'\(backing)' looks like \(found): say -F \(found) if it is")
        }
        source.sharesAll = true
        let edge: Edge
        do throws(BlockError) {
            // Its size is all that is asked: an encrypted one needs no key for that.
            edge = try await session.use(source, as: "image creation", .none)
        } catch {
            throw error.doing("cannot open the backing image")
        }
        if values["size"] == nil { values["size"] = String(edge.size) }
        try await session.graph.detach(edge)
    }

    private func detectedFormat(
        _ source: ImageSource, in session: ToolSession
    ) async throws(BlockError) -> String {
        var source = source
        source.withoutBacking = true
        guard case .string(let format) = try await session.options(for: source)["driver"] else {
            return "raw"
        }
        return format
    }

    private func summary(_ values: [String: String]) -> String {
        var text = "Formatting '\(name)', fmt=\(format)"
        for option in CreationOption.options(of: format) {
            guard let value = values[option.name] ?? option.standard else { continue }
            let escaped = value.split(separator: ",", omittingEmptySubsequences: false)
                .joined(separator: ",,")
            text += " \(option.name)=\(escaped)"
        }
        return text
    }

    private func write(
        _ values: [String: String], to path: String, _ create: @escaping Create,
        in session: ToolSession
    ) async throws(BlockError) {
        let known = CreationOption.options(of: format)
        var options: JSONObject = [:]
        var file: JSONObject = ["filename": .string(path), "size": 0]
        for option in known {
            guard let value = values[option.name] else { continue }
            if option.isOfFile {
                file[option.driverName] = option.driverValue(value)
            } else {
                options.set(option.driverName, option.driverValue(value))
            }
        }
        // The file is made first, empty, and the format then in it. What a raw image reserves is
        // reserved by the file.
        if isRaw {
            file["size"] = options["size"]
            file["preallocation"] = options["preallocation"]
        }
        // A device is there already, and as long as it is.
        let isDevice = try await isDevice(path, in: session)
        if isRaw {
            if isDevice {
                try await clearDevice(path, options, in: session)
            } else {
                try await makeFile(file, in: session)
            }
            return
        }
        options["file"] = [
            "driver": isDevice ? "host_device" : "file", "filename": .string(path),
        ]
        var data: JSONObject?
        if case .string(let dataPath) = options["data-file"] {
            data = ["filename": .string(dataPath), "size": 0]
            options["data-file"] = ["driver": "file", "filename": .string(dataPath)]
        }
        let (fileOptions, dataOptions) = (file, data)
        try await Self.create(create, options, in: session) { () async throws(BlockError) in
            if isDevice {
                unfinished?.willChange()
            } else {
                try await makeFile(fileOptions, in: session)
            }
            if let dataOptions {
                try await Self.create(try Self.fileCreator(), dataOptions, in: session)
            }
        }
    }

    /// Whether the image is to be made on a device.
    ///
    /// - Throws: where the user says that it is one, or a file, and it is not.
    private func isDevice(
        _ path: String, in session: ToolSession
    ) async throws(BlockError) -> Bool {
        if format == "host_device" {
            guard try await session.isBlockDevice(path) else {
                throw BlockError(
                    .invalidArgument, "'\(path)' is not a block device", remedy: "use -f raw")
            }
            return true
        }
        let isDevice = (try? await session.isBlockDevice(path)) ?? false
        guard !isDevice || format != "file" else {
            throw BlockError(
                .invalidArgument, "'\(path)' is a block device",
                remedy: "use -f raw or -f host_device")
        }
        return isDevice
    }

    /// Makes a raw disk of a device, which keeps its size: the beginning is cleared, or it would go on being
    /// taken for the format that it had.
    private func clearDevice(
        _ path: String, _ options: JSONObject, in session: ToolSession
    ) async throws(BlockError) {
        var options = options
        options["file"] = ["driver": "host_device", "filename": .string(path)]
        let unfinished = unfinished
        let clear: Create = { creation throws(BlockError) in
            let size = try creation.options.size("size") ?? 0
            let preallocation =
                try creation.options.enumeration("preallocation", as: Preallocation.self) ?? .off
            guard preallocation == .off else {
                throw BlockError(
                    .unsupported, "a device has its space: 'preallocation' is for files")
            }
            let target = try await creation.target("file")
            try creation.options.finish()
            guard size <= target.size else {
                throw BlockError(
                    .invalidArgument,
                    "the device has \(target.size) bytes, not \(size), and cannot grow")
            }
            unfinished?.willChange()
            let zeroes = try IOVector(allocating: min(Self.sectorBytes, target.size))
            zeroes.fill(0)
            try await target.write(0, from: zeroes)
            try await target.flush()
        }
        try await Self.create(clear, options, in: session)
    }

    /// What formats are told by begins in the first sector.
    private static let sectorBytes = 512

    private static func fileCreator() throws(BlockError) -> Create? {
        try ToolSession.registry.driver(named: "file").create
    }

    private func makeFile(_ file: JSONObject, in session: ToolSession) async throws(BlockError) {
        unfinished?.willChange()
        do throws(BlockError) {
            try await Self.create(try Self.fileCreator(), file, in: session)
        } catch {
            // Others use it, or it cannot be opened: it is as it was.
            if [.permissionDenied, .readOnly, .busy, .invalidArgument].contains(error.code) {
                unfinished?.didNotChange()
            }
            throw error
        }
    }

    /// - Parameter prepare: called when the options are known to be good, before anything is touched.
    private static func create(
        _ create: Create?, _ options: JSONObject, in session: ToolSession,
        prepare: (() async throws(BlockError) -> Void)? = nil
    ) async throws(BlockError) {
        guard let create else { return }
        let creation = ImageCreation(
            session.graph, options: try OptionReader(.object(options), of: "the new image"),
            prepare: prepare)
        do throws(BlockError) {
            try await create(creation)
        } catch {
            try? await creation.finish()
            throw error
        }
        try await creation.finish()
    }
}

extension JSONObject {
    /// Sets a member, or with one dot in the name a member of a member: `encrypt.format`.
    mutating func set(_ name: String, _ value: JSONValue) {
        guard let dot = name.firstIndex(of: ".") else {
            self[name] = value
            return
        }
        let outer = String(name[..<dot])
        var group = JSONObject()
        if case .object(let found) = self[outer] { group = found }
        group[String(name[name.index(after: dot)...])] = value
        self[outer] = .object(group)
    }
}

extension ImageCreate {
    /// The options that open the new image: the key that it was made with.
    func openingOptions() throws(BlockError) -> JSONObject {
        var result = JSONObject()
        let values = try readOptions()
        for name in ["key-secret", "encrypt.key-secret"] {
            if let value = values[name] { result.set(name, .string(value)) }
        }
        return result
    }
}
