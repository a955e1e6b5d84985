import BlockCore
import BlockGraph
import QMP

// External data files (§Header, incompatible feature bit 2): guest data in a file of its own, each
// cluster at its guest offset. Nobody counts these clusters, and none of them is ever shared. With the
// autoclear bit "raw external data" that file is a raw image of the disk at any time.

extension QCOW2.Header {
    /// The name of the data file, where the image has it.
    var dataFileName: String? {
        extensions.first { $0.type == QCOW2.HeaderExtension.externalDataName }
            .map { String(decoding: $0.data, as: UTF8.self) }
    }
}

extension QCOW2Driver {
    /// The data file is valid as a raw image.
    var isRawDataFile: Bool {
        hasDataFile && image.header.autoclear.contains(.rawExternalData)
    }

    /// Opens the data file, if the image has one.
    static func openDataFile(
        _ header: QCOW2.Header, _ opening: NodeOpening, _ file: Edge
    ) async throws(BlockError) -> Edge? {
        let given = try opening.options.value("data-file")
        guard header.incompatible.contains(.externalData) else {
            guard given == nil else {
                throw BlockError(
                    .invalidArgument,
                    "'data-file' is given, but the image has no external data file")
            }
            return nil
        }
        // What the image says of itself needs no data: nothing that it names is opened for it.
        if given == nil, opening.node.options.isForInformation, opening.node.isReadOnly {
            return nil
        }
        let fallback = given == nil ? try await dataFileOptions(header, opening, file) : nil
        guard
            let data = try await opening.child("data-file", roles: .data, fallback: fallback)
        else {
            throw BlockError(
                .invalidArgument, "the image needs its external data file",
                remedy: "give 'data-file': a node's name, or options to open one")
        }
        guard !data.node.isReadOnly || opening.node.isReadOnly else {
            throw BlockError(
                .readOnly, "the external data file '\(data.node.name)' is read-only",
                remedy: "open with read-only=on")
        }
        return data
    }

    /// The options that open the data file that the image names.
    private static func dataFileOptions(
        _ header: QCOW2.Header, _ opening: NodeOpening, _ file: Edge
    ) async throws(BlockError) -> JSONValue? {
        guard let name = header.dataFileName, !name.isEmpty else { return nil }
        guard !opening.node.options.isUntrusted else {
            throw BlockError(
                .permissionDenied,
                "the image names the external data file '\(name)', which is not followed in images "
                    + "that are not trusted", remedy: "give 'data-file' explicitly")
        }
        guard !isProtocolName(name, opening.graph.registry) else {
            throw BlockError(
                .permissionDenied,
                "the image names the external data file '\(name)': only names of local files are "
                    + "followed", remedy: "give 'data-file' explicitly")
        }
        let path = resolve(name, beside: file.node.driver.filename)
        do throws(BlockError) {
            let image = try await options(forPath: path, format: "raw", opening)
            return image["file"]
        } catch {
            throw error.doing("cannot open the external data file '\(path)'")
        }
    }

    /// Whether a stored name says how to open something else than a file: `json:{…}`, `nbd:…`, `ssh://…`.
    /// Whoever wrote the image would choose what is opened, with options of every driver.
    static func isProtocolName(_ name: String, _ registry: DriverRegistry) -> Bool {
        guard let colon = name.firstIndex(of: ":"), !name[..<colon].contains("/") else {
            return false
        }
        let scheme = String(name[..<colon])
        return scheme == "json" || name[colon...].hasPrefix("://")
            || (try? registry.driver(named: scheme)) != nil
    }

    /// Grows a data file that ends before `end`, where something is about to be written, to the size of the
    /// disk. What it does not have reads as zeroes.
    @inline(__always)
    func makeDataFileReach(_ end: Int) async throws(BlockError) {
        if hasDataFile, end > data.size { try await growDataFile(to: max(end, node.size)) }
    }

    /// Makes the data file at least `size` bytes long, with what is new reserved as `preallocation` says.
    func growDataFile(
        to size: Int, _ preallocation: Preallocation = .off
    ) async throws(BlockError) {
        guard hasDataFile, data.size < size else { return }
        do throws(BlockError) {
            // Metadata is in the image.
            try await data.resize(to: size, preallocation == .metadata ? .off : preallocation)
        } catch  where error.code == .unsupported {
            throw BlockError(
                .noSpace, "the external data file has \(data.size) bytes, the disk \(size)",
                remedy: "give it a larger device")
        }
    }
}
