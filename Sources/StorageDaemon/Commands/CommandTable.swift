import BlockCore
import QMP

/// A command: what it is called, takes and gives back, and what runs it.
///
/// One declaration here is what arguments are checked against, what `query-commands` and
/// `query-qmp-schema` tell, and where the command is found.
struct DaemonCommand: Sendable {
    typealias Handler =
        @Sendable (StorageDaemon) -> (JSONValue) async throws(BlockError) -> JSONValue

    let schema: CommandSchema
    let handler: Handler

    init(_ schema: CommandSchema, _ handler: @escaping Handler) {
        self.schema = schema
        self.handler = handler
    }
}

extension StorageDaemon {
    static let commands: [DaemonCommand] =
        controlCommands + objectCommands + graphCommands + bitmapCommands + exportCommands
        + queryCommands + statisticsCommands + objectModelCommands + characterDeviceCommands
        + traceCommands + threadCommands

    static let handlers: [String: DaemonCommand.Handler] = Dictionary(
        commands.map { ($0.schema.name, $0.handler) }, uniquingKeysWith: { first, _ in first })

    /// All that the daemon says and understands.
    public static let schema = Schema(
        commands: [
            CommandSchema(
                "qmp_capabilities", .optional("enable", .array(.named("QMPCapability"))))
        ] + commands.map(\.schema),
        events: events, definitions: schemaDefinitions)

    // MARK: Tables

    private static let controlCommands = [
        DaemonCommand(
            CommandSchema(
                "query-version", result: .named("VersionInfo"), allowsOutOfBand: true),
            StorageDaemon.queryVersion),
        DaemonCommand(
            CommandSchema(
                "query-commands", result: .array(.named("CommandInfo")), allowsOutOfBand: true),
            StorageDaemon.queryCommands),
        DaemonCommand(
            CommandSchema("query-qmp-schema", result: .array(.any)), StorageDaemon.querySchema),
        DaemonCommand(CommandSchema("quit"), StorageDaemon.quitCommand),
    ]

    private static let objectCommands = [
        DaemonCommand(
            CommandSchema("object-add", argumentsOf: "ObjectOptions"), StorageDaemon.objectAdd),
        DaemonCommand(
            CommandSchema("object-del", .required("id", .string)), StorageDaemon.objectDel),
    ]

    private static let graphCommands = [
        DaemonCommand(
            CommandSchema("blockdev-add", argumentsOf: "BlockdevOptions"),
            StorageDaemon.blockdevAdd),
        DaemonCommand(
            CommandSchema("blockdev-del", .required("node-name", .string)),
            StorageDaemon.blockdevDel),
        DaemonCommand(
            CommandSchema(
                "blockdev-reopen", .required("options", .array(.named("BlockdevOptions")))),
            StorageDaemon.blockdevReopen),
        DaemonCommand(
            CommandSchema("blockdev-replace", argumentsOf: "BlockdevReplace"),
            StorageDaemon.blockdevReplace),
        DaemonCommand(
            CommandSchema(
                "blockdev-snapshot-internal-sync", argumentsOf: "BlockdevSnapshotInternal"),
            StorageDaemon.snapshotInternal),
        DaemonCommand(
            CommandSchema(
                "blockdev-snapshot-delete-internal-sync", .required("device", .string),
                .optional("id", .string), .optional("name", .string),
                result: .named("SnapshotInfo")),
            StorageDaemon.snapshotDeleteInternal),
        DaemonCommand(
            CommandSchema(
                "block_resize", .optional("device", .string), .optional("node-name", .string),
                .required("size", .integer)),
            StorageDaemon.blockResize),
        DaemonCommand(
            CommandSchema(
                "blockdev-create", .required("job-id", .string),
                .required("options", .named("BlockdevCreateOptions"))),
            StorageDaemon.blockdevCreate),
        DaemonCommand(
            CommandSchema(
                "x-blockdev-amend", .required("job-id", .string), .required("node-name", .string),
                .required("options", .named("BlockdevAmendOptions")), .optional("force", .boolean),
                features: ["unstable"]),
            StorageDaemon.blockdevAmend),
        DaemonCommand(
            CommandSchema("job-cancel", .required("id", .string)), StorageDaemon.jobCancel),
        DaemonCommand(
            CommandSchema("job-dismiss", .required("id", .string)), StorageDaemon.jobDismiss),
        DaemonCommand(
            CommandSchema(
                "transaction", .required("actions", .array(.named("TransactionAction"))),
                .optional("properties", .named("TransactionProperties"))),
            StorageDaemon.transaction),
    ]

    private static let bitmapCommands = [
        DaemonCommand(
            CommandSchema("block-dirty-bitmap-add", argumentsOf: "BlockDirtyBitmapAdd"),
            StorageDaemon.bitmapAdd),
        DaemonCommand(
            CommandSchema("block-dirty-bitmap-remove", argumentsOf: "BlockDirtyBitmap"),
            StorageDaemon.bitmapRemove),
        DaemonCommand(
            CommandSchema("block-dirty-bitmap-clear", argumentsOf: "BlockDirtyBitmap"),
            StorageDaemon.bitmapClear),
        DaemonCommand(
            CommandSchema("block-dirty-bitmap-enable", argumentsOf: "BlockDirtyBitmap"),
            StorageDaemon.bitmapEnable),
        DaemonCommand(
            CommandSchema("block-dirty-bitmap-disable", argumentsOf: "BlockDirtyBitmap"),
            StorageDaemon.bitmapDisable),
        DaemonCommand(
            CommandSchema("block-dirty-bitmap-merge", argumentsOf: "BlockDirtyBitmapMerge"),
            StorageDaemon.bitmapMerge),
        DaemonCommand(
            CommandSchema(
                "x-debug-block-dirty-bitmap-sha256", argumentsOf: "BlockDirtyBitmap",
                result: .named("BlockDirtyBitmapSha256"), features: ["unstable"]),
            StorageDaemon.bitmapChecksum),
    ]

    private static let exportCommands = [
        DaemonCommand(
            CommandSchema(
                "nbd-server-start", .required("addr", .named("SocketAddressLegacy")),
                .optional("handshake-max-seconds", .integer),
                .optional("tls-creds", .string), .optional("tls-authz", .string),
                .optional("max-connections", .integer)),
            StorageDaemon.nbdServerStart),
        DaemonCommand(
            CommandSchema(
                "nbd-server-add", .required("device", .string), .optional("name", .string),
                .optional("description", .string), .optional("writable", .boolean),
                .optional("bitmap", .string), features: ["deprecated"]),
            StorageDaemon.nbdServerAdd),
        DaemonCommand(
            CommandSchema(
                "nbd-server-remove", .required("name", .string),
                .optional("mode", .named("BlockExportRemoveMode")), features: ["deprecated"]),
            StorageDaemon.nbdServerRemove),
        DaemonCommand(CommandSchema("nbd-server-stop"), StorageDaemon.nbdServerStop),
        DaemonCommand(
            CommandSchema(
                "x-query-nbd-server", result: .named("NBDServerInfoOrNull"), features: ["unstable"]),
            StorageDaemon.queryNBDServer),
        DaemonCommand(
            CommandSchema("block-export-add", argumentsOf: "BlockExportOptions"),
            StorageDaemon.blockExportAdd),
        DaemonCommand(
            CommandSchema(
                "block-export-del", .required("id", .string),
                .optional("mode", .named("BlockExportRemoveMode"))),
            StorageDaemon.blockExportDel),
        DaemonCommand(
            CommandSchema(
                "query-block-exports", result: .array(.named("BlockExportInfo")),
                allowsOutOfBand: true),
            StorageDaemon.queryBlockExports),
    ]

    private static let queryCommands = [
        DaemonCommand(
            CommandSchema("query-block", result: .array(.any)), StorageDaemon.queryBlock),
        DaemonCommand(
            CommandSchema(
                "query-named-block-nodes", .optional("flat", .boolean), result: .array(.any)),
            StorageDaemon.queryNamedBlockNodes),
        DaemonCommand(
            CommandSchema(
                "query-jobs", result: .array(.named("JobInfo")), allowsOutOfBand: true),
            StorageDaemon.queryJobs),
        DaemonCommand(
            CommandSchema("query-block-jobs", result: .array(.any)),
            StorageDaemon.queryBlockJobs),
        DaemonCommand(
            CommandSchema(
                "x-debug-query-block-graph", result: .named("XDbgBlockGraph"),
                features: ["unstable"]),
            StorageDaemon.queryBlockGraph),
    ]

    private static let events = [
        EventSchema(
            "BLOCK_WRITE_THRESHOLD", .required("node-name", .string),
            .required("amount-exceeded", .integer), .required("write-threshold", .integer)),
        EventSchema("BLOCK_EXPORT_DELETED", .required("id", .string)),
        EventSchema(
            "BLOCK_IMAGE_CORRUPTED", .required("device", .string), .optional("node-name", .string),
            .required("msg", .string), .optional("offset", .integer), .optional("size", .integer),
            .required("fatal", .boolean)),
        EventSchema(
            "JOB_STATUS_CHANGE", .required("id", .string),
            .required("status", .named("JobStatus"))),
    ]
}
