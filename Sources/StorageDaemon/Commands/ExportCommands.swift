import BlockCore
import BlockExports
import BlockGraph
import BlockIO
import QMP

/// The NBD server and its exports.
extension StorageDaemon {
    func requireExport(_ identifier: String) throws(BlockError) -> ExportRecord {
        guard let record = exports.first(where: { $0.identifier == identifier }) else {
            throw BlockError(.notFound, "there is no export '\(identifier)'")
        }
        return record
    }

    // MARK: Server

    /// `nbd-server-start`: `addr` is `{type, data}`, or flat as `--nbd-server` gives it.
    func nbdServerStart(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        guard nbdServer == nil else {
            throw BlockError(
                .busy, "the NBD server is running already", remedy: "nbd-server-stop stops it")
        }
        let reader = try OptionReader(arguments, of: "nbd-server-start")
        var options = NBDServer.Options()
        if let seconds = try reader.int("handshake-max-seconds") {
            guard seconds >= 0, seconds <= Int(UInt32.max) else {
                throw BlockError(.invalidArgument, "'handshake-max-seconds' is out of bounds")
            }
            options.handshakeSeconds = seconds
        }
        if let count = try reader.int("max-connections") {
            guard count >= 0, count <= Int(UInt32.max) else {
                throw BlockError(.invalidArgument, "'max-connections' is out of bounds")
            }
            options.connectionCountMax = count
        }
        let credentials = try reader.string("tls-creds")
        if let identifier = credentials {
            options.credentials = try tlsCredentials(identifier, for: .server)
        }
        if let identifier = try reader.string("tls-authz") {
            guard options.credentials != nil else {
                throw BlockError(
                    .invalidArgument, "'tls-authz' needs 'tls-creds': without TLS nobody is checked"
                )
            }
            options.authorize = try authorization(identifier)
        }
        guard let address = try reader.value("addr") else {
            throw BlockError(.invalidArgument, "nbd-server-start: parameter 'addr' is missing")
        }
        try reader.finish()
        let listeners = try await SocketAddressOption(address, for: self).listen(
            on: thread)
        let server = NBDServer(on: thread, options)
        for listener in listeners { server.listen(on: listener) }
        nbdServer = server
        nbdServerCredentials = credentials
        return [:]
    }

    /// `nbd-server-stop`: ends all its exports and clients.
    func nbdServerStop(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let server = try requireServer()
        nbdServer = nil
        let gone = exports.filter { !$0.isClosing }
        for record in gone { record.isClosing = true }
        try await end("nbd-server-stop") { [self] () throws(BlockError) in
            defer { for record in gone { isGone(record) } }
            try await server.stop()
        }
        return [:]
    }

    private func requireServer() throws(BlockError) -> NBDServer {
        guard let nbdServer else {
            throw BlockError(
                .notFound, "the NBD server is not running", remedy: "nbd-server-start starts it")
        }
        return nbdServer
    }

    /// `x-query-nbd-server`: where clients find the exports; null while the server does not run.
    func queryNBDServer(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        guard let nbdServer else { return .null }
        var result: JSONObject = [
            "addresses": .array(nbdServer.addresses.map(\.option)),
            "clients": .integer(nbdServer.clientCount),
        ]
        if let nbdServerCredentials { result["tls-creds"] = .string(nbdServerCredentials) }
        return .object(result)
    }

    // MARK: Exports

    /// `block-export-add`.
    func blockExportAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "block-export-add")
        let type = try reader.required("type")
        guard type == "nbd" else {
            throw BlockError(
                .unsupported, "there is no export type '\(type)'", remedy: "use type=nbd")
        }
        let identifier = try reader.required("id")
        try Self.checkIdentifier(identifier, of: "an export")
        let nodeName = try reader.required("node-name")
        let name = try reader.string("name") ?? nodeName
        let description = try reader.string("description") ?? ""
        let writable = try reader.bool("writable") ?? false
        let depth = try reader.bool("allocation-depth") ?? false
        let isFixed = try reader.bool("fixed-iothread") ?? false
        let home = try reader.string("iothread")
        if let home { _ = try requireThread(home) }
        let writeThrough = try reader.bool("writethrough") ?? false
        let bitmaps = try reader.list("bitmaps") ?? []
        try reader.finish()
        try await addExport(
            identifier: identifier, nodeName: nodeName, name: name, description: description,
            writable: writable, depth: depth, bitmaps: bitmaps, home: home, isFixed: isFixed,
            writeThrough: writeThrough)
        return [:]
    }

    /// - Parameters:
    ///   - home: the I/O thread that the node moves to first; where it cannot, that is an error only if `isFixed`.
    private func addExport(
        identifier: String, nodeName: String, name: String, description: String, writable: Bool,
        depth: Bool, bitmaps: [JSONValue], home: String? = nil, isFixed: Bool = false,
        writeThrough: Bool = false
    ) async throws(BlockError) {
        try checkFree(identifier, name)
        if let home {
            do throws(BlockError) {
                try await moveAside(nodeName, to: home)
            } catch  where !isFixed && error.code != .cancelled {}
            // Other commands may have run meanwhile.
            try checkFree(identifier, name)
        }
        let server = try requireServer()
        let export = try await onThread(of: nodeName) { node throws(BlockError) in
            var exported: [NBDExport.Bitmap] = []
            for value in bitmaps { exported.append(try exportedBitmap(value, below: node)) }
            for found in exported { await found.bitmap.load() }
            return try NBDExport(
                name: name, description: description, node: node, writable: writable,
                allocationDepth: depth, bitmaps: exported, isFixed: isFixed,
                writeThrough: writeThrough)
        }
        try server.add(export)
        exports.append(ExportRecord(identifier, export, of: nodeName))
    }

    private func moveAside(_ nodeName: String, to thread: String) async throws(BlockError) {
        let component: (BlockGraph) -> [BlockNode] = { graph in
            graph.node(named: nodeName)?.component ?? []
        }
        try await holdingUsers(of: component) { _ throws(BlockError) in
            try await move(nodeName, to: try requireThread(thread).graph)
        }
    }

    private func checkFree(_ identifier: String, _ name: String) throws(BlockError) {
        let server = try requireServer()
        guard !exports.contains(where: { $0.identifier == identifier }) else {
            throw BlockError(.alreadyExists, "there is an export '\(identifier)' already")
        }
        guard server.exportNamed(name) == nil else {
            throw BlockError(.alreadyExists, "there is an NBD export named '\(name)' already")
        }
    }

    /// A dirty bitmap by its name, on `node` or below it, or by its node's name and its own.
    private func exportedBitmap(
        _ value: JSONValue, below node: BlockNode
    ) throws(BlockError) -> NBDExport.Bitmap {
        if case .string(let name) = value { return try NBDExport.Bitmap(named: name, below: node) }
        let reader = try OptionReader(value, of: "a dirty bitmap")
        let owner = try node.graph.requireNode(named: try reader.required("node"))
        let bitmap = try owner.requireDirtyBitmap(named: try reader.required("name"))
        try reader.finish()
        return NBDExport.Bitmap(bitmap, of: owner)
    }

    /// `block-export-del`.
    func blockExportDel(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "block-export-del")
        let record = try requireExport(try reader.required("id"))
        let mode = try removalMode(reader)
        try reader.finish()
        try await remove(record, hard: mode)
        return [:]
    }

    private func removalMode(_ reader: OptionReader) throws(BlockError) -> Bool {
        switch try reader.string("mode") ?? "safe" {
        case "safe": return false
        case "hard": return true
        case let other:
            throw BlockError(
                .invalidArgument, "parameter 'mode' does not accept '\(other)'",
                remedy: "use safe or hard")
        }
    }

    /// Removes an export: no client finds it from here on, and it is gone, which an event tells, when the
    /// requests of those that used it have ended.
    private func remove(_ record: ExportRecord, hard: Bool) async throws(BlockError) {
        let export = record.export
        guard !record.isClosing else {
            throw BlockError(.busy, "export '\(record.identifier)' is going away already")
        }
        let isFree = try await export.seat.visit { () throws(BlockError) in
            hard || export.retireUnused()
        }
        guard isFree else {
            throw BlockError(
                .busy, "export '\(record.identifier)' has clients",
                remedy: "wait for them, or use mode=hard")
        }
        nbdServer?.remove(export)
        record.isClosing = true
        try await end("removing export '\(record.identifier)'") { [self] () throws(BlockError) in
            // It is gone, whether or not all of it could be made durable.
            defer { isGone(record) }
            try await export.seat.visit { () throws(BlockError) in try await export.close() }
        }
    }

    /// Removes an export that was added while the graph is drained, and still is. No event tells: for
    /// clients it was never there.
    func takeBack(_ record: ExportRecord) async throws(BlockError) {
        let export = record.export
        nbdServer?.remove(export)
        record.isClosing = true
        defer { exports.removeAll { $0 === record } }
        try await export.seat.visit { () throws(BlockError) in
            try await export.close(refusing: true)
        }
    }

    private func isGone(_ record: ExportRecord) {
        exports.removeAll { $0 === record }
        emit("BLOCK_EXPORT_DELETED", ["id": .string(record.identifier)])
    }

    /// `nbd-server-add`: an export whose identifier is its name.
    func nbdServerAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "nbd-server-add")
        let device = try reader.required("device")
        let name = try reader.string("name") ?? device
        let description = try reader.string("description") ?? ""
        let wanted = try reader.bool("writable") ?? false
        let bitmap = try reader.string("bitmap")
        try reader.finish()
        // As documented for this command: read-only when the node is.
        let isReadOnly = try await onThread(of: device) { $0.isReadOnly }
        try await addExport(
            identifier: name, nodeName: device, name: name, description: description,
            writable: wanted && !isReadOnly, depth: false,
            bitmaps: bitmap.map { [.string($0)] } ?? [])
        return [:]
    }

    /// `nbd-server-remove`.
    func nbdServerRemove(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "nbd-server-remove")
        let record = try requireExport(try reader.required("name"))
        let mode = try removalMode(reader)
        try reader.finish()
        try await remove(record, hard: mode)
        return [:]
    }

    /// `query-block-exports`.
    func queryBlockExports(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        var result: [JSONValue] = []
        for record in exports {
            let export = record.export
            let node = try await export.seat.visit { () throws(BlockError) in export.edge?.node.name
            }
            result.append([
                "id": .string(record.identifier), "type": "nbd",
                "node-name": .string(node ?? record.nodeName),
                "shutting-down": .bool(record.isClosing),
            ])
        }
        return .array(result)
    }
}
