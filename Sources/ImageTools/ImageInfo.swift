import BlockCore
import BlockGraph
import BlockProtocols
import QMP

extension BlockNode {
    /// A file that ends within a sector is shown to the sector's end, as everybody rounds it.
    var sizeInWholeSectors: Int { size.roundedUp(to: 512) ?? size }
}

/// What `info` tells of one image.
public struct ImageInfo: Sendable {
    public var filename: String
    public var format: String
    /// In bytes, as a guest sees it.
    public var virtualSize: Int
    /// Bytes that it takes on storage; `nil` where that is not known.
    public var actualSize: Int?
    /// 0 where there are no clusters.
    public var clusterSize: Int
    public var isDirty: Bool
    public var isEncrypted: Bool
    public var backingName: String?
    /// As seen from where the command runs.
    public var backingPath: String?
    public var backingFormat: String?
    /// Inside the image.
    public var snapshots: [InternalSnapshot]
    /// `{"type": …, "data": {…}}`.
    public var specific: JSONValue?

    // MARK: Gathering

    /// - Parameter filename: what the user called the image; `nil` takes the driver's name for it.
    public init(of node: BlockNode, filename: String? = nil) async throws(BlockError) {
        let information = try await node.driver.information
        snapshots = node.driver.snapshotStore?.internalSnapshots ?? []
        self.filename = filename ?? node.driver.filename
        format = node.description.name
        virtualSize = node.sizeInWholeSectors
        var storage = node
        while let file = storage.file { storage = file.node }
        if let file = storage.driver as? FileDriver {
            actualSize = try await file.allocatedBytes()
        }
        if let data = node.child(named: "data-file")?.node.driver as? FileDriver {
            actualSize = (actualSize ?? 0) + (try await data.allocatedBytes())
        }
        clusterSize = information.clusterSize
        isDirty = information.isDirty
        isEncrypted = information.isEncrypted
        backingName = information.backingName
        backingFormat = information.backingFormat
        backingPath = backingName.map { ImageName.resolve($0, besides: self.filename) }
        specific = information.formatSpecific
    }

    /// The image's information, and with `chain` that of its backing images, top first.
    public static func gather(
        _ source: ImageSource, chain: Bool, in session: ToolSession
    ) async throws(BlockError) -> [ImageInfo] {
        var result: [ImageInfo] = []
        var above = ImagesAbove()
        var next: ImageSource? = source
        while var source = next {
            source.withoutBacking = true
            source.isForInformation = true
            source.withoutKey = true
            let given = try source.givenOptions()
            var info = try await one(source, given == nil ? source.name : nil, in: session)
            if let given, let name = extendedName(given, info) { info.filename = name }
            result.append(info)
            next = nil
            guard chain, !source.isUntrusted else { break }
            var below: ImageSource
            // What a name says counts, as it does where the images are read. What the user gives for the top
            // one hides nothing that the image says.
            if result.count > 1, let backing = given?["backing"] {
                guard case .object(let options) = backing else { break }
                below = ImageSource(JSONValue.object(options).text(), isOptions: true)
            } else {
                guard let path = info.backingPath else { break }
                below = ImageSource(path, formatInHeader: info.backingFormat)
            }
            try above.add(source)
            below.sharesAll = source.sharesAll
            below.objects = source.objects
            next = below
        }
        return result
    }

    /// The name of an image that is opened with options that change what it reads as, which a plain name does
    /// not tell: `json:{…}`. `nil` where there are none, or more than that is special about it.
    private static func extendedName(_ given: JSONObject, _ info: ImageInfo) -> String? {
        let keys: [String]
        switch info.format {
        case "raw": keys = ["offset", "size"]
        case "luks": keys = ["key-secret"]
        case "qcow2": keys = ["encrypt.key-secret"]
        default: return nil
        }
        guard let file = given["file"], file["driver"].map({ $0 == "file" }) ?? true,
            case .string? = file["filename"]
        else { return nil }
        var values: [String: JSONValue] = [
            "driver": .string(info.format),
            "file": ["driver": "file", "filename": .string(info.filename)],
        ]
        for key in keys {
            values[key] = key.hasPrefix("encrypt.") ? given["encrypt"]?["key-secret"] : given[key]
        }
        guard values.count > 2 else { return nil }
        // In the order that scripts have seen them in.
        var named = JSONObject()
        for key in ["encrypt.key-secret", "offset", "driver", "size", "file", "key-secret"] {
            named[key] = values[key]
        }
        return "json:" + JSONValue.object(named).text()
    }

    static func one(
        _ source: ImageSource, _ filename: String?, in session: ToolSession
    ) async throws(BlockError) -> ImageInfo {
        let edge = try await session.use(source, as: "image information", .none)
        var name = filename
        if let filename, case .path(let path) = ImageName.kind(filename) { name = path }
        let info = try await ImageInfo(of: edge.node, filename: name)
        try await session.graph.detach(edge)
        return info
    }

    // MARK: Text

    /// As people read it.
    public var text: String {
        var lines = [
            "image: \(filename)", "file format: \(format)",
            "virtual size: \(SizeText.format(virtualSize)) (\(virtualSize) bytes)",
            "disk size: \(actualSize.map(SizeText.format) ?? "unavailable")",
        ]
        if isEncrypted { lines.append("encrypted: yes") }
        if clusterSize > 0 { lines.append("cluster_size: \(clusterSize)") }
        if isDirty { lines.append("cleanly shut down: no") }
        if let backingName {
            var line = "backing file: \(backingName)"
            if let backingPath, backingPath != backingName {
                line += " (actual path: \(backingPath))"
            }
            lines.append(line)
        }
        if let backingFormat { lines.append("backing file format: \(backingFormat)") }
        var text = lines.joined(separator: "\n") + "\n"
        text += SnapshotList.text(snapshots)
        if let data = specific?["data"] { text += Self.specificText(data) }
        return text
    }

    /// The lines on what only this format has; also in the exerciser's `info`.
    static func specificText(_ data: JSONValue) -> String {
        "Format specific information:\n" + lines(data, level: 1)
    }

    private static func lines(_ value: JSONValue, level: Int) -> String {
        let indent = String(repeating: "    ", count: level)
        switch value {
        case .object(let object):
            return object.members.map { member in
                let key = String(member.key.map { $0 == "-" ? " " : $0 })
                return indent + key + ":" + tail(member.value, level)
            }.joined()
        case .array(let values):
            return values.enumerated().map { index, value in
                "\(indent)[\(index)]:" + tail(value, level)
            }.joined()
        default:
            return indent + scalar(value) + "\n"
        }
    }

    /// What follows a key: a value on its line, or a group below it.
    private static func tail(_ value: JSONValue, _ level: Int) -> String {
        switch value {
        case .object, .array: "\n" + lines(value, level: level + 1)
        default: " " + scalar(value) + "\n"
        }
    }

    private static func scalar(_ value: JSONValue) -> String {
        if case .string(let text) = value { return text }
        return value.text()
    }

    /// With the keys of QMP's `ImageInfo`.
    public var json: JSONValue {
        var result: JSONObject = [:]
        if let backingFormat { result["backing-filename-format"] = .string(backingFormat) }
        if !snapshots.isEmpty { result["snapshots"] = .array(snapshots.map(\.json)) }
        result["virtual-size"] = .integer(virtualSize)
        result["filename"] = .string(filename)
        if clusterSize > 0 { result["cluster-size"] = .integer(clusterSize) }
        result["format"] = .string(format)
        if let actualSize { result["actual-size"] = .integer(actualSize) }
        if let specific { result["format-specific"] = specific }
        if let backingName, let backingPath {
            result["full-backing-filename"] = .string(backingPath)
            result["backing-filename"] = .string(backingName)
        }
        if isEncrypted { result["encrypted"] = true }
        result["dirty-flag"] = .bool(isDirty)
        return .object(result)
    }
}
