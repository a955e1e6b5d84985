import BlockCore
import BlockGraph
import QMP

/// `measure`: how much storage a new image will take.
public struct ImageMeasure: Sendable {
    public struct Result: Sendable, Equatable {
        public var requiredBytes: Int
        public var fullBytes: Int
        /// What copying the persistent dirty bitmaps takes on top; `nil` where either side has none.
        public var bitmapBytes: Int?
    }

    public var format = "raw"
    /// `key=value,…`, each as often as the option was given.
    public var options: [String] = []
    /// Measure for an empty disk of this size…
    public var size: Int?
    /// …or for a copy of this image.
    public var source: ImageSource?
    public var snapshot: String?

    public init() {}

    /// What there is for `-o`.
    public func help() throws(BlockError) -> String { try creation.help() }
    public var wantsHelp: Bool { creation.wantsHelp }

    private var creation: ImageCreate {
        var create = ImageCreate("")
        create.format = format
        create.options = options
        return create
    }

    public func run(in session: ToolSession) async throws(BlockError) -> Result {
        guard (size == nil) != (source == nil) else {
            throw BlockError(
                .invalidArgument, "measure needs either a size or an image",
                remedy: "give --size or the image's name")
        }
        let driver = try ToolSession.registry.driver(named: format)
        guard let measure = driver.measure else {
            throw BlockError(.unsupported, "images of format '\(format)' cannot be measured")
        }
        guard let source else { return try Self.empty(try need(measure, size ?? 0)) }
        let user = try await use(source, in: session)
        let contents = try CopySource([user])
        let need = try need(measure, contents.size)
        var result = try Self.empty(need)
        if need.unit > 0 {
            guard
                let sum = try await Self.data(of: contents, unit: need.unit)
                    .adding(need.fixedBytes)
            else { throw Self.tooLarge }
            result.requiredBytes = sum
        }
        result.bitmapBytes = try await bitmaps(of: user, unit: max(need.unit, 512))
        try await session.graph.detach(user)
        return result
    }

    private func use(
        _ source: ImageSource, in session: ToolSession
    ) async throws(BlockError) -> Edge {
        guard let snapshot else { return try await session.use(source, as: "measure") }
        let node = try await session.openSnapshot(snapshot, of: try await session.open(source))
        defer { node.release("command") }
        return try session.graph.attach(NamedUser("measure"), to: node, .read)
    }

    private static func empty(_ need: StorageNeed) throws(BlockError) -> Result {
        Result(requiredBytes: need.fixedBytes, fullBytes: need.fullBytes, bitmapBytes: nil)
    }

    private static var tooLarge: BlockError {
        BlockError(.invalidArgument, "the image would be too large")
    }

    private func need(
        _ measure: (OptionReader) throws(BlockError) -> StorageNeed, _ size: Int
    ) throws(BlockError) -> StorageNeed {
        var values = try creation.readOptions()
        guard let rounded = size.roundedUp(to: 512), rounded <= Limits.nodeSizeMax else {
            throw Self.tooLarge
        }
        values["size"] = String(rounded)
        let known = CreationOption.options(of: format)
        var object: JSONObject = [:]
        for option in known where !option.isOfFile {
            if let value = values[option.name] {
                object.set(option.driverName, option.driverValue(value))
            }
        }
        return try measure(try OptionReader(.object(object), of: "the new image"))
    }

    /// Bytes of data, in whole units.
    private static func data(
        of source: CopySource, unit: Int
    ) async throws(BlockError) -> Int {
        let cursor = ExtentCursor(source, unit: unit, dataMax: 1 << 40)
        var sum = 0
        while let item = try await cursor.next() {
            guard item.kind == .data, let whole = item.range.count.roundedUp(to: unit) else {
                continue
            }
            guard let next = sum.adding(whole) else { throw tooLarge }
            sum = next
        }
        return sum
    }

    // MARK: Bitmaps

    /// The directory, and tables and data of each bitmap, in clusters.
    private func bitmaps(of user: Edge, unit: Int) async throws(BlockError) -> Int? {
        var image = user.node
        // A snapshot's bitmaps are its image's.
        if snapshot != nil, let file = image.child(named: "file") { image = file.node }
        guard image.description.name == "qcow2", format == "qcow2" else { return nil }
        let data = try await image.driver.information.formatSpecific?["data"]
        guard data?["compat"] != "0.10" else { return nil }
        guard try creation.readOptions()["compat"].map({ $0 != "0.10" && $0 != "v2" }) ?? true
        else {
            return nil
        }
        guard case .array(let list)? = data?["bitmaps"], !list.isEmpty else { return 0 }
        func clusters(_ bytes: Int) -> Int { bytes / unit + (bytes % unit == 0 ? 0 : 1) }
        var total = 0
        var directory = 0
        for bitmap in list {
            guard case .integer(let granularity)? = bitmap["granularity"], granularity > 0,
                case .string(let name)? = bitmap["name"]
            else { continue }
            let bits = user.size / granularity + (user.size % granularity == 0 ? 0 : 1)
            let bytes = bits / 8 + (bits % 8 == 0 ? 0 : 1)
            let count = clusters(bytes)
            total += (count + clusters(count * 8)) * unit
            directory += (24 + name.utf8.count + 7) & ~7
        }
        return total + clusters(directory) * unit
    }
}

extension ImageMeasure.Result {
    /// As people read it.
    public var text: String {
        var text = "required size: \(requiredBytes)\nfully allocated size: \(fullBytes)\n"
        if let bitmapBytes { text += "bitmaps size: \(bitmapBytes)\n" }
        return text
    }

    /// With the keys of QMP's `BlockMeasureInfo`.
    public var json: JSONValue {
        var object: JSONObject = [:]
        if let bitmapBytes { object["bitmaps"] = .integer(bitmapBytes) }
        object["required"] = .integer(requiredBytes)
        object["fully-allocated"] = .integer(fullBytes)
        return .object(object)
    }
}
