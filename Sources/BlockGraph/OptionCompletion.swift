import BlockCore
import BlockIO
import QMP

// Options of images as command lines and `json:` names in images give them: drivers may be left out.

extension BlockGraph {
    /// The options that a `json:{…}` name stands for, complete; keys may have dots.
    ///
    /// - Parameter text: what follows `json:`.
    public func imageOptions(json text: String) async throws(BlockError) -> JSONValue {
        guard case .object(let options) = try JSONParser.parse(text).nestingDottedKeys() else {
            throw BlockError(.invalidArgument, "an image's options must be an object")
        }
        return .object(try await completeDrivers(options))
    }

    /// Adds the drivers that options leave out: a storage's follows from its file, a format's from the
    /// image's first bytes. What is found to be raw that way is guarded (`x-probed`): what a guest writes
    /// must not make it another format's.
    ///
    /// - Parameters:
    ///   - mayProbe: the format may be found out.
    ///   - isStorage: the options are of what stands below a format.
    /// - Throws: also when a format must be found out and the image cannot be read, or may not be probed.
    public func completeDrivers(
        _ given: JSONObject, mayProbe: Bool = true, isStorage: Bool = false
    ) async throws(BlockError) -> JSONObject {
        var options = given
        var description: DriverDescription?
        if case .string(let name)? = options["driver"] {
            description = try registry.driver(named: name)
        } else if isStorage, case .string(let path)? = options["filename"] {
            options["driver"] = .string(await fileDriver(of: path))
            return options
        }
        let isFormat = description.map { $0.kind == .format } ?? true
        for key in ["file", "image", "data-file", "backing"] {
            guard case .object(let child)? = options[key] else { continue }
            // Below a format stands storage; a backing image is an image of its own; filters go
            // where their child could stand.
            let isBelow = key == "backing" ? false : isFormat || isStorage
            options[key] = .object(
                try await completeDrivers(child, mayProbe: mayProbe, isStorage: isBelow))
        }
        if options["driver"] == nil, case .object(let file)? = options["file"] {
            guard mayProbe else {
                throw BlockError(
                    .invalidArgument, "the image's format is not given, and it is not trusted",
                    remedy: "give 'driver'")
            }
            let format = try await probeFormat(file)
            options["driver"] = .string(format)
            if format == "raw" { options["x-probed"] = true }
        }
        return options
    }

    /// The driver of a file: block devices have one of their own.
    public func fileDriver(of path: String) async -> String {
        (try? await isBlockDevice(path)) == true ? "host_device" : "file"
    }

    /// - Throws: when the file cannot be opened.
    public func isBlockDevice(_ path: String) async throws(BlockError) -> Bool {
        let system = thread.system
        // In one go: each trip to a worker thread is a part of what a short command takes.
        return try await thread.offload { () throws(BlockError) in
            let handle = try system.open(path, FileOptions(writable: false))
            defer { system.close(handle) }
            return try system.status(of: handle).kind == .blockDevice
        }
    }

    /// The format of an image from its first bytes.
    ///
    /// - Parameter file: complete options of its storage.
    /// - Throws: also when the image is of a format that there is no driver for.
    public func probeFormat(_ file: JSONObject) async throws(BlockError) -> String {
        var options = file
        // Reading only: neither the file's lock nor another cache mode matters.
        options["read-only"] = true
        options["force-share"] = true
        options["aio"] = nil
        let node = try await open(.object(options))
        let edge: Edge
        do throws(BlockError) {
            edge = try attach(NamedUser("format detection"), to: node, .read)
        } catch {
            node.release("opening")
            throw error
        }
        node.release("opening")
        let name = node.driver.filename
        let start = try IOVector(allocating: min(4096, node.size))
        do throws(BlockError) {
            try await edge.read(0, into: start)
        } catch {
            try? await detach(edge)
            throw error
        }
        try await detach(edge)
        return try registry.format(of: name, beginning: start.array)
    }
}
