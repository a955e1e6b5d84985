import BlockCore
import BlockGraph
import QMP

/// `amend`: changes properties of an image that is there already.
public struct ImageAmend: Sendable {
    public var source: ImageSource
    /// `key=value,…`, each as often as the option was given.
    public var options: [String] = []
    /// Do also what may make data unreadable for good.
    public var isForced = false

    public init(_ source: ImageSource) {
        self.source = source
        self.source.isWritable = true
    }

    /// Whether `-o help` was asked for.
    public var wantsHelp: Bool {
        options.contains { $0.split(separator: ",").contains { $0 == "help" || $0 == "?" } }
    }

    /// What there is for `-o` with `format`, one line each.
    public static func help(format: String) throws(BlockError) -> String {
        let options = try known(format)
        return "Amend options for '\(format)':\n" + CreationOption.helpLines(options)
    }

    private static func known(_ format: String) throws(BlockError) -> [CreationOption] {
        let options = CreationOption.amendable(of: format)
        guard !options.isEmpty else {
            throw BlockError(
                .unsupported, "images of format '\(format)' cannot be amended",
                remedy: "amend knows qcow2 and luks")
        }
        return options
    }

    /// Does it; everything is durable on return.
    public func run(in session: ToolSession, progress: Progress) async throws(BlockError) {
        let edge = try await session.use(
            source, as: "amend",
            Access(uses: [.write, .resize], shares: [.consistentRead]))
        let format = edge.node.description.name
        var values = JSONObject()
        let known = try Self.known(format)
        for text in options {
            for (option, value) in try CreationOption.read(text, known, format) {
                values.set(option.driverName, option.driverValue(try option.normalized(value)))
            }
        }
        progress.begin(100)
        let amendment = ImageAmendment(
            try OptionReader(.object(values), of: "amend"), isForced: isForced)
        try await session.graph.amend(edge.node, amendment)
        try await session.graph.detach(edge)
        progress.finish()
    }
}
