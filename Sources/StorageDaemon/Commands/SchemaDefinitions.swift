import BlockFilters
import BlockGraph
import QMP

// The types that commands and events refer to, by the names of QEMU's interface. Node options are
// described for clients and checked by the drivers, which know more, and take `key=value` text too.

extension StorageDaemon {
    static let schemaDefinitions: [String: SchemaDefinition] = [
        controlDefinitions, exportDefinitions, nodeDefinitions, objectDefinitions,
        bitmapDefinitions, objectModelDefinitions, characterDeviceDefinitions, traceDefinitions,
        threadDefinitions, creationDefinitions,
    ].reduce(into: [:]) { all, more in all.merge(more) { first, _ in first } }

    private static let controlDefinitions: [String: SchemaDefinition] = [
        "QMPCapability": .enumeration(["oob"]),
        "VersionInfo": .object(
            ObjectSchema([
                .required("qemu", .named("VersionTriple")), .required("package", .string),
            ])),
        "VersionTriple": .object(
            ObjectSchema([
                .required("major", .integer), .required("minor", .integer),
                .required("micro", .integer),
            ])),
        "CommandInfo": .object(ObjectSchema([.required("name", .string)])),
        "JobStatus": .enumeration([
            "undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending",
            "aborting", "concluded", "null",
        ]),
        "JobType": .enumeration(["create", "amend"]),
        "JobInfo": .object(
            ObjectSchema([
                .required("id", .string), .required("type", .named("JobType")),
                .required("status", .named("JobStatus")),
                .required("current-progress", .integer), .required("total-progress", .integer),
                .optional("error", .string),
            ])),
        "TransactionAction": .object(
            ObjectSchema(
                [.required("type", .named("TransactionActionKind"))], tag: "type",
                variants: [
                    .init("abort", "AbortWrapper"),
                    .init("blockdev-add", "BlockdevOptionsWrapper"),
                    .init("blockdev-replace", "BlockdevReplaceWrapper"),
                    .init("block-export-add", "BlockExportOptionsWrapper"),
                    .init(
                        "blockdev-snapshot-internal-sync", "BlockdevSnapshotInternalWrapper"),
                    .init("block-dirty-bitmap-add", "BlockDirtyBitmapAddWrapper"),
                    .init("block-dirty-bitmap-remove", "BlockDirtyBitmapWrapper"),
                    .init("block-dirty-bitmap-clear", "BlockDirtyBitmapWrapper"),
                    .init("block-dirty-bitmap-enable", "BlockDirtyBitmapWrapper"),
                    .init("block-dirty-bitmap-disable", "BlockDirtyBitmapWrapper"),
                    .init("block-dirty-bitmap-merge", "BlockDirtyBitmapMergeWrapper"),
                ])),
        "TransactionActionKind": .enumeration(
            [
                "abort", "blockdev-add", "blockdev-replace", "block-export-add",
                "blockdev-snapshot-internal-sync",
            ] + BitmapAction.allCases.map(\.rawValue)),
        "Abort": .object(ObjectSchema([])),
        "AbortWrapper": .object(ObjectSchema([.optional("data", .named("Abort"))])),
        "BlockdevOptionsWrapper": .object(
            ObjectSchema([.required("data", .named("BlockdevOptions"))])),
        "BlockdevReplaceWrapper": .object(
            ObjectSchema([.required("data", .named("BlockdevReplace"))])),
        "BlockExportOptionsWrapper": .object(
            ObjectSchema([.required("data", .named("BlockExportOptions"))])),
        "BlockdevSnapshotInternalWrapper": .object(
            ObjectSchema([.required("data", .named("BlockdevSnapshotInternal"))])),
        "BlockdevSnapshotInternal": .object(
            ObjectSchema([.required("device", .string), .required("name", .string)])),
        "SnapshotInfo": .object(
            ObjectSchema([
                .required("id", .string), .required("name", .string),
                .required("vm-state-size", .integer), .required("date-sec", .integer),
                .required("date-nsec", .integer), .required("vm-clock-sec", .integer),
                .required("vm-clock-nsec", .integer), .optional("icount", .integer),
            ])),
        "TransactionProperties": .object(
            ObjectSchema([.optional("completion-mode", .named("ActionCompletionMode"))])),
        "ActionCompletionMode": .enumeration(["individual", "grouped"]),
    ]

    private static let bitmapDefinitions: [String: SchemaDefinition] = [
        "BlockDirtyBitmap": .object(
            ObjectSchema([.required("node", .string), .required("name", .string)])),
        "BlockDirtyBitmapOrStr": .alternate([.string, .named("BlockDirtyBitmap")]),
        "BlockDirtyBitmapAdd": .object(
            ObjectSchema([
                .required("node", .string), .required("name", .string),
                .optional("granularity", .integer), .optional("persistent", .boolean),
                .optional("disabled", .boolean),
            ])),
        "BlockDirtyBitmapMerge": .object(
            ObjectSchema([
                .required("node", .string), .required("target", .string),
                .required("bitmaps", .array(.named("BlockDirtyBitmapOrStr"))),
            ])),
        "BlockDirtyBitmapWrapper": .object(
            ObjectSchema([.required("data", .named("BlockDirtyBitmap"))])),
        "BlockDirtyBitmapAddWrapper": .object(
            ObjectSchema([.required("data", .named("BlockDirtyBitmapAdd"))])),
        "BlockDirtyBitmapMergeWrapper": .object(
            ObjectSchema([.required("data", .named("BlockDirtyBitmapMerge"))])),
        "BlockDirtyBitmapSha256": .object(ObjectSchema([.required("sha256", .string)])),
    ]

    private static let objectDefinitions: [String: SchemaDefinition] = [
        "ObjectOptions": .object(
            ObjectSchema(
                [.required("qom-type", .named("ObjectType")), .required("id", .string)],
                tag: "qom-type",
                variants: DaemonObject.Kind.allCases.map {
                    .init($0.rawValue, "ObjectOptions-\($0.rawValue)")
                })),
        "ObjectType": .enumeration(DaemonObject.Kind.allCases.map(\.rawValue)),
        "QCryptoSecretFormat": .enumeration(["raw", "base64"]),
        "QCryptoTLSCredsEndpoint": .enumeration(["client", "server"]),
        "ObjectOptions-secret": .object(
            ObjectSchema([
                .optional("data", .string), .optional("file", .string),
                .optional("format", .named("QCryptoSecretFormat")), .optional("keyid", .string),
                .optional("iv", .string),
            ])),
        "ObjectOptions-tls-creds-x509": .object(
            ObjectSchema([
                .optional("dir", .string),
                .optional("endpoint", .named("QCryptoTLSCredsEndpoint")),
                .optional("verify-peer", .boolean), .optional("priority", .string),
                .optional("passwordid", .string), .optional("sanity-check", .boolean),
            ])),
        "ObjectOptions-tls-creds-psk": .object(
            ObjectSchema([
                .optional("dir", .string),
                .optional("endpoint", .named("QCryptoTLSCredsEndpoint")),
                .optional("verify-peer", .boolean), .optional("priority", .string),
                .optional("username", .string),
            ])),
        "ObjectOptions-secret_keyring": .object(
            ObjectSchema([
                .required("serial", .integer), .optional("format", .named("QCryptoSecretFormat")),
                .optional("keyid", .string), .optional("iv", .string),
            ])),
        "ObjectOptions-tls-creds-anon": .object(
            ObjectSchema([
                .optional("dir", .string),
                .optional("endpoint", .named("QCryptoTLSCredsEndpoint")),
                .optional("verify-peer", .boolean), .optional("priority", .string),
            ])),
        "ObjectOptions-tls-cipher-suites": .object(
            ObjectSchema([
                .optional("dir", .string),
                .optional("endpoint", .named("QCryptoTLSCredsEndpoint")),
                .optional("verify-peer", .boolean), .optional("priority", .string),
            ])),
        "ObjectOptions-authz-simple": .object(ObjectSchema([.required("identity", .string)])),
        "ObjectOptions-authz-list": .object(
            ObjectSchema([
                .optional("policy", .named("QAuthZListPolicy")),
                .optional("rules", .array(.named("QAuthZListRule"))),
            ])),
        "ObjectOptions-authz-list-file": .object(
            ObjectSchema([.required("filename", .string), .optional("refresh", .boolean)])),
        "QAuthZListPolicy": .enumeration(["deny", "allow"]),
        "QAuthZListFormat": .enumeration(["exact", "glob"]),
        "QAuthZListRule": .object(
            ObjectSchema([
                .required("match", .string), .required("policy", .named("QAuthZListPolicy")),
                .optional("format", .named("QAuthZListFormat")),
            ])),
        "ObjectOptions-iothread": .object(
            ObjectSchema([
                .optional("poll-max-ns", .integer), .optional("poll-grow", .integer),
                .optional("poll-shrink", .integer), .optional("aio-max-batch", .integer),
                .optional("thread-pool-min", .integer), .optional("thread-pool-max", .integer),
            ])),
        "ObjectOptions-main-loop": .object(
            ObjectSchema([
                .optional("aio-max-batch", .integer), .optional("thread-pool-min", .integer),
                .optional("thread-pool-max", .integer),
            ])),
        "ObjectOptions-throttle-group": .object(
            ObjectSchema(
                [.optional("limits", .named("ThrottleLimits"))] + throttleLimits(prefix: "x-"))),
        "ThrottleLimits": .object(ObjectSchema(throttleLimits(prefix: ""))),
    ]

    private static func throttleLimits(prefix: String) -> [SchemaMember] {
        ThrottleLimits.Kind.allCases.flatMap { kind in
            ["", "-max", "-max-length"].map { .optional(prefix + kind.name + $0, .integer) }
        } + [.optional("\(prefix)iops-size", .integer)]
    }

    private static let exportDefinitions: [String: SchemaDefinition] = [
        "BlockExportRemoveMode": .enumeration(["safe", "hard"]),
        "BlockExportType": .enumeration(["nbd"]),
        "BlockExportOptions": .object(
            ObjectSchema(
                [
                    .required("type", .named("BlockExportType")), .required("id", .string),
                    .required("node-name", .string), .optional("fixed-iothread", .boolean),
                    .optional("iothread", .string), .optional("writable", .boolean),
                    .optional("writethrough", .boolean),
                ], tag: "type", variants: [.init("nbd", "BlockExportOptionsNbd")])),
        "BlockExportOptionsNbd": .object(
            ObjectSchema([
                .optional("name", .string), .optional("description", .string),
                .optional("bitmaps", .array(.named("BlockDirtyBitmapOrStr"))),
                .optional("allocation-depth", .boolean),
            ])),
        "BlockExportInfo": .object(
            ObjectSchema([
                .required("id", .string), .required("type", .named("BlockExportType")),
                .required("node-name", .string), .required("shutting-down", .boolean),
            ])),
        "NBDServerInfoOrNull": .alternate([.named("NBDServerInfo"), .null]),
        "NBDServerInfo": .object(
            ObjectSchema([
                .required("addresses", .array(.named("SocketAddress"))),
                .required("clients", .integer), .optional("tls-creds", .string),
            ])),
        "SocketAddress": .object(
            ObjectSchema(
                [.required("type", .named("SocketAddressType"))], tag: "type",
                variants: [
                    .init("inet", "InetSocketAddress"), .init("unix", "UnixSocketAddress"),
                    .init("vsock", "VsockSocketAddress"), .init("fd", "FdSocketAddress"),
                ])),
        "SocketAddressLegacy": .object(
            ObjectSchema(
                [.required("type", .named("SocketAddressType"))], tag: "type",
                variants: [
                    .init("inet", "InetSocketAddressWrapper"),
                    .init("unix", "UnixSocketAddressWrapper"),
                    .init("vsock", "VsockSocketAddressWrapper"),
                    .init("fd", "FdSocketAddressWrapper"),
                ])),
        "SocketAddressType": .enumeration(["inet", "unix", "vsock", "fd"]),
        "InetSocketAddressWrapper": .object(
            ObjectSchema([.required("data", .named("InetSocketAddress"))])),
        "UnixSocketAddressWrapper": .object(
            ObjectSchema([.required("data", .named("UnixSocketAddress"))])),
        "VsockSocketAddressWrapper": .object(
            ObjectSchema([.required("data", .named("VsockSocketAddress"))])),
        "FdSocketAddressWrapper": .object(
            ObjectSchema([.required("data", .named("FdSocketAddress"))])),
        "InetSocketAddress": .object(
            ObjectSchema([
                .required("host", .string), .required("port", .string),
                .optional("numeric", .boolean), .optional("to", .integer),
                .optional("ipv4", .boolean), .optional("ipv6", .boolean),
                .optional("keep-alive", .boolean), .optional("keep-alive-count", .integer),
                .optional("keep-alive-idle", .integer), .optional("keep-alive-interval", .integer),
                .optional("mptcp", .boolean),
            ])),
        "UnixSocketAddress": .object(
            ObjectSchema([
                .required("path", .string), .optional("abstract", .boolean),
                .optional("tight", .boolean),
            ])),
        "VsockSocketAddress": .object(
            ObjectSchema([.required("cid", .string), .required("port", .string)])),
        "FdSocketAddress": .object(ObjectSchema([.required("str", .string)])),
    ]

    private static let nodeDefinitions: [String: SchemaDefinition] = [
        "BlockdevDriver": .enumeration(registry.drivers.map(\.name)),
        "BlockdevOptions": .object(
            ObjectSchema(
                [
                    .required("driver", .named("BlockdevDriver")),
                    .optional("node-name", .string), .optional("read-only", .boolean),
                    .optional("auto-read-only", .boolean), .optional("force-share", .boolean),
                    .optional("untrusted", .boolean),
                    .optional("discard", .named("BlockdevDiscardOptions")),
                    .optional("detect-zeroes", .named("BlockdevDetectZeroesOptions")),
                    .optional("cache", .named("BlockdevCacheOptions")),
                ], tag: "driver",
                variants: registry.drivers.map { .init($0.name, "BlockdevOptions-\($0.name)") },
                isCheckedByReceiver: true)),
        "BlockdevRef": .alternate([.named("BlockdevOptions"), .string]),
        "BlockdevRefOrNull": .alternate([.named("BlockdevOptions"), .string, .null]),
        "BlockdevDiscardOptions": .enumeration(["ignore", "unmap"]),
        "BlockdevDetectZeroesOptions": .enumeration(["off", "on", "unmap"]),
        "BlockdevCacheOptions": .object(
            ObjectSchema([.optional("direct", .boolean), .optional("no-flush", .boolean)])),
        "BlockdevAioOptions": .enumeration(["threads", "native", "io_uring"]),
        "BlockdevQcow2EncryptionFormat": .enumeration(["aes", "luks"]),
        "BlockdevQcow2Encryption": .object(
            ObjectSchema([
                .required("format", .named("BlockdevQcow2EncryptionFormat")),
                .optional("key-secret", .string),
            ])),
        "Qcow2OverlapCheckMode": .enumeration(["none", "constant", "cached", "all"]),
        "Qcow2OverlapCheckFlags": .object(
            ObjectSchema(
                [.optional("template", .named("Qcow2OverlapCheckMode"))]
                    + [
                        "main-header", "active-l1", "active-l2", "refcount-table",
                        "refcount-block", "snapshot-table", "inactive-l1", "inactive-l2",
                        "bitmap-directory",
                    ].map { .optional($0, .boolean) })),
        "Qcow2OverlapChecks": .alternate([
            .named("Qcow2OverlapCheckFlags"), .named("Qcow2OverlapCheckMode"),
        ]),
        "OnOffAuto": .enumeration(["auto", "on", "off"]),
        "OnCbwError": .enumeration(["break-guest-write", "break-snapshot"]),
        "BlkdebugEvent": .enumeration(DebugEvent.allCases.map(\.rawValue)),
        "BlkdebugIOType": .enumeration([
            "read", "write", "write-zeroes", "discard", "flush", "block-status",
        ]),
        "BlkdebugInjectErrorOptions": .object(
            ObjectSchema([
                .required("event", .named("BlkdebugEvent")), .optional("state", .integer),
                .optional("iotype", .named("BlkdebugIOType")), .optional("errno", .integer),
                .optional("sector", .integer), .optional("once", .boolean),
                .optional("immediately", .boolean),
            ])),
        "BlkdebugSetStateOptions": .object(
            ObjectSchema([
                .required("event", .named("BlkdebugEvent")), .optional("state", .integer),
                .required("new_state", .integer),
            ])),
        "BlockPermission": .enumeration(Permission.each.map(\.name)),
        "PreallocMode": .enumeration(["off", "metadata", "falloc", "full"]),
        "BlockdevReplace": .object(
            ObjectSchema(
                [
                    .required("parent-type", .named("BlockParentType")),
                    .required("new-child", .string),
                ], tag: "parent-type",
                variants: [
                    .init("driver", "BlockdevReplaceDriver"),
                    .init("export", "BlockdevReplaceExport"),
                ])),
        "BlockParentType": .enumeration(["driver", "export"]),
        "BlockdevReplaceDriver": .object(
            ObjectSchema([.required("node-name", .string), .required("child", .string)])),
        "BlockdevReplaceExport": .object(ObjectSchema([.required("export-id", .string)])),
        "BlockdevAmendOptions": .object(
            ObjectSchema(
                [.required("driver", .named("BlockdevDriver"))], isCheckedByReceiver: true)),
        "XDbgBlockGraph": .object(
            ObjectSchema([
                .required("nodes", .array(.any)), .required("edges", .array(.any)),
            ])),
    ].merging(
        registry.drivers.map { driver in
            let options = driverOptions.first { $0.name == driver.name }?.options ?? []
            return ("BlockdevOptions-\(driver.name)", .object(ObjectSchema(options)))
        }, uniquingKeysWith: { first, _ in first })

    /// What each driver takes beside the options of every node.
    static let driverOptions: [(name: String, options: [SchemaMember])] = [
        ("file", fileOptions), ("host_device", fileOptions), ("null-co", nullOptions),
        ("null-aio", nullOptions),
        (
            "raw",
            [
                .required("file", .named("BlockdevRef")), .optional("offset", .integer),
                .optional("size", .integer),
            ]
        ),
        (
            "qcow2",
            [
                .required("file", .named("BlockdevRef")),
                .optional("backing", .named("BlockdevRefOrNull")),
                .optional("encrypt", .named("BlockdevQcow2Encryption")),
                .optional("data-file", .named("BlockdevRef")),
                .optional("lazy-refcounts", .boolean), .optional("cache-size", .integer),
                .optional("l2-cache-size", .integer),
                .optional("l2-cache-entry-size", .integer),
                .optional("refcount-cache-size", .integer),
                .optional("cache-clean-interval", .integer),
                .optional("overlap-check", .named("Qcow2OverlapChecks")),
                .optional("pass-discard-request", .boolean),
                .optional("pass-discard-snapshot", .boolean),
                .optional("pass-discard-other", .boolean),
                .optional("discard-no-unref", .boolean),
            ]
        ),
        (
            "copy-before-write",
            [
                .required("file", .named("BlockdevRef")),
                .required("target", .named("BlockdevRef")),
                .optional("bitmap", .named("BlockDirtyBitmap")),
                .optional("on-cbw-error", .named("OnCbwError")),
                .optional("cbw-timeout", .integer), .optional("min-cluster-size", .integer),
            ]
        ),
        (
            "luks",
            [
                .required("file", .named("BlockdevRef")),
                .optional("header", .named("BlockdevRef")), .optional("key-secret", .string),
            ]
        ),
        (
            "snapshot-access",
            [
                .required("file", .named("BlockdevRef")), .optional("snapshot-id", .string),
                .optional("snapshot-name", .string),
            ]
        ),
        (
            "throttle",
            [.required("file", .named("BlockdevRef")), .required("throttle-group", .string)]
        ),
        (
            "copy-on-read",
            [.required("file", .named("BlockdevRef")), .optional("bottom", .string)]
        ),
        ("compress", [.required("file", .named("BlockdevRef"))]), ("blkdebug", debugOptions),
        (
            "blkverify",
            [.required("test", .named("BlockdevRef")), .required("raw", .named("BlockdevRef"))]
        ),
        (
            "blklogwrites",
            [
                .required("file", .named("BlockdevRef")), .required("log", .named("BlockdevRef")),
                .optional("log-sector-size", .integer), .optional("log-append", .boolean),
                .optional("log-super-update-interval", .integer),
            ]
        ),
        (
            "preallocate",
            [
                .required("file", .named("BlockdevRef")), .optional("prealloc-align", .integer),
                .optional("prealloc-size", .integer),
            ]
        ),
    ]

    private static let debugOptions: [SchemaMember] = [
        .required("image", .named("BlockdevRef")), .optional("config", .string),
        .optional("align", .integer), .optional("max-transfer", .integer),
        .optional("opt-write-zero", .integer), .optional("max-write-zero", .integer),
        .optional("opt-discard", .integer), .optional("max-discard", .integer),
        .optional("inject-error", .array(.named("BlkdebugInjectErrorOptions"))),
        .optional("set-state", .array(.named("BlkdebugSetStateOptions"))),
        .optional("take-child-perms", .array(.named("BlockPermission"))),
        .optional("unshare-child-perms", .array(.named("BlockPermission"))),
    ]

    private static let nullOptions: [SchemaMember] = [
        .optional("size", .integer), .optional("latency-ns", .integer),
        .optional("read-zeroes", .boolean),
    ]

    private static let fileOptions: [SchemaMember] = [
        .required("filename", .string), .optional("aio", .named("BlockdevAioOptions")),
        .optional("aio-max-batch", .integer), .optional("locking", .named("OnOffAuto")),
        .optional("drop-cache", .boolean),
    ]
}
