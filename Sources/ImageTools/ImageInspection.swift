import BlockCore
import BlockGraph
import QMP

/// `inspect`: what an image that nobody vouches for is, found out without opening anything but it.
///
/// The name is a path and nothing else: no `json:`, no protocol. Names that the image stores are
/// told, never followed.
public struct ImageInspection: Sendable {
    /// Another file that the image names.
    public struct Reference: Sendable, Equatable {
        public enum Kind: String, Sendable {
            case backing = "backing-file"
            case data = "data-file"
        }
        public var kind: Kind
        public var name: String
        public var format: String?
    }

    public var filename: String
    /// `raw` where nothing is recognised.
    public var format: String
    /// Whether there is a driver for it.
    public var isSupported: Bool
    public var fileSize: Int
    /// As a guest would see it; `nil` where that is not known.
    public var virtualSize: Int?
    public var clusterSize = 0
    public var isDirty = false
    public var isCorrupt = false
    public var references: [Reference] = []
    /// Why the image could not be looked into, as far as it could not.
    public var problem: String?

    private static let startBytesMax = 4096
    private static let endBytes = 512

    // MARK: Gathering

    public static func gather(
        _ path: String, in session: ToolSession
    ) async throws(BlockError) -> ImageInspection {
        var file: JSONObject = [
            "driver": "file", "filename": .string(path), "read-only": true, "force-share": true,
        ]
        if try await session.isBlockDevice(path) { file["driver"] = "host_device" }
        var result = try await look(at: path, file, in: session)
        guard result.isSupported, result.format != "raw" else {
            if result.format == "raw" { result.virtualSize = result.fileSize }
            return result
        }
        do throws(BlockError) {
            try await result.lookInside(file, in: session)
        } catch {
            result.problem = error.message
        }
        return result
    }

    /// The file alone: its size, and what its first and last bytes look like.
    private static func look(
        at path: String, _ file: JSONObject, in session: ToolSession
    ) async throws(BlockError) -> ImageInspection {
        let node = try await session.graph.open(.object(file))
        let edge = try session.graph.attach(NamedUser("image inspection"), to: node, .read)
        node.release("opening")
        let start = try IOVector(allocating: min(startBytesMax, edge.size))
        let end = try IOVector(allocating: min(endBytes, edge.size))
        try await edge.read(0, into: start)
        try await edge.read(edge.size - end.count, into: end)
        let size = edge.size
        try await session.graph.detach(edge)

        var format = start.array.withUnsafeBytes { ToolSession.registry.probe($0) }
        if format == "raw" {
            format =
                start.array.withUnsafeBytes { ImageMarks.format(ofStart: $0) }
                ?? end.array.withUnsafeBytes { ImageMarks.format(ofEnd: $0) } ?? format
        }
        let isSupported = (try? ToolSession.registry.driver(named: format)) != nil
        return ImageInspection(
            filename: path, format: format, isSupported: isSupported, fileSize: size)
    }

    /// What the format's own driver says, with nothing below it but the file.
    private mutating func lookInside(
        _ file: JSONObject, in session: ToolSession
    ) async throws(BlockError) {
        var inherited = NodeOptions()
        inherited.isReadOnly = true
        inherited.sharesAll = true
        inherited.isUntrusted = true
        inherited.isForCheck = true
        var options: JSONObject = ["driver": .string(format), "file": .object(file)]
        if try ToolSession.registry.driver(named: format).supportsBacking {
            options["backing"] = .null
        }
        let node = try await session.graph.open(.object(options), inheriting: inherited)
        let edge = try session.graph.attach(NamedUser("image inspection"), to: node, .read)
        node.release("opening")
        let information = try await node.driver.information
        virtualSize = node.size
        clusterSize = information.clusterSize
        isDirty = information.isDirty
        isCorrupt = information.isCorrupt
        if let name = information.backingName {
            references.append(
                Reference(kind: .backing, name: name, format: information.backingFormat))
        }
        if case .string(let name) = information.formatSpecific?["data"]?["data-file"] {
            references.append(Reference(kind: .data, name: name, format: "raw"))
        }
        try await session.graph.detach(edge)
    }

    // MARK: Output

    /// As people read it.
    public var text: String {
        var lines = [
            "image: \(Self.printable(filename))",
            "file format: \(format)" + (isSupported ? "" : " (not supported)"),
            "file size: \(SizeText.format(fileSize)) (\(fileSize) bytes)",
        ]
        if let virtualSize {
            lines.append("virtual size: \(SizeText.format(virtualSize)) (\(virtualSize) bytes)")
        }
        if clusterSize > 0 { lines.append("cluster size: \(clusterSize)") }
        if isDirty { lines.append("cleanly shut down: no") }
        if isCorrupt { lines.append("marked corrupt: yes") }
        for reference in references {
            let format = reference.format.map { " (\(Self.printable($0)))" } ?? ""
            lines.append(
                "names a \(reference.kind == .backing ? "backing" : "data") file: "
                    + Self.printable(reference.name) + format)
        }
        if references.isEmpty, problem == nil, isSupported { lines.append("names other files: no") }
        if let problem { lines.append("problem: \(Self.printable(problem))") }
        return lines.joined(separator: "\n") + "\n"
    }

    /// A terminal obeys control characters: they are not shown.
    private static func printable(_ text: String) -> String {
        String(
            String.UnicodeScalarView(
                text.unicodeScalars.map {
                    $0.properties.generalCategory == .control ? "?" : $0
                }))
    }

    public var json: JSONValue {
        var result: JSONObject = [
            "filename": .string(filename), "format": .string(format),
            "supported": .bool(isSupported), "file-size": .integer(fileSize),
        ]
        if let virtualSize { result["virtual-size"] = .integer(virtualSize) }
        if clusterSize > 0 { result["cluster-size"] = .integer(clusterSize) }
        result["dirty-flag"] = .bool(isDirty)
        result["corrupt"] = .bool(isCorrupt)
        result["references"] = .array(
            references.map { reference in
                var value: JSONObject = [
                    "kind": .string(reference.kind.rawValue), "name": .string(reference.name),
                ]
                if let format = reference.format { value["format"] = .string(format) }
                return .object(value)
            })
        if let problem { result["problem"] = .string(problem) }
        return .object(result)
    }
}
